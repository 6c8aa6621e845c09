"""The paper's values, as its tables print them."""

from eval import paper_values as paper
from eval.report.results import paper_tables


def test_the_tables_are_as_printed_in_the_paper():
    unified, tokenizers, probe = (
        {row.name: [cell.value for cell in row.cells] for row in table.rows} for table in paper_tables()
    )
    assert unified["UM3 1.5B"] == ["34.3", "45.35", "74.65", "43.09", "54.22", "8.6", "20.2", "17.3", "44.1", "0.25"]
    assert unified["Llama-3.2 1B"] == ["34.9", "48.7", "75.95", "43.5", "61.48", "", "", "", "", ""]
    assert tokenizers["QLIP-B-8-256"] == ["75.6", "0.7", "26.79", "0.7905"]
    assert probe["BSQViT"] == ["29.3", "25.4", ""]


def test_every_language_task_has_a_metric_and_a_value():
    assert paper.LANGUAGE_METRICS.keys() < paper.UM3.keys()
    assert sum(paper.GENEVAL_LLAMAGEN_QLIP[skill] for skill in list(paper.GENEVAL_LLAMAGEN_QLIP)[:6]) / 6 < 0.5
