"""The text rules that VQAv2, TextVQA and others compare answers by, with the quirks that published figures contain.

Sources: vqaEval.py of github.com/GT-Vision-Lab/VQA, and the EvalAI processor of LLaVA's m4c_evaluator.py, which
published TextVQA figures use.
"""

import re
from collections.abc import Sequence

MARKS = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA = re.compile(r"\d,+\d")
PERIOD = re.compile(r"\.(?!\d)")
MAX_PERIODS = 32  # the official script passes a regex flag, re.UNICODE = 32, as the count
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
ARTICLES = ("a", "an", "the")
CONTRACTED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've couldn't've hadn't've he'd've
it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've there'd've they'd've we'd've
who'd've wouldn't've y'all'll you'd've 'ow's'at y'all'd've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""Word with one apostrophe missing -> the word; I'm and the like are in the official table but never match."""


def normalise_vqa(text: str) -> str:
    """The normaliser of the official VQA script: marks, periods, case, number words, articles, contractions.

    A mark is deleted everywhere if it stands beside a space anywhere in the text, or if the text holds a comma between
    digits; else it becomes a space.
    """
    result, has_number = text, DIGIT_COMMA.search(text) is not None
    for mark in MARKS:
        is_deleted = has_number or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_deleted else " ")
    words = PERIOD.sub("", result, count=MAX_PERIODS).lower().split()
    words = [word for word in (DIGITS.get(word, word) for word in words) if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def normalise_evalai(text: str) -> str:
    """EvalAI's answer processor: commas and question marks off, 's apart, then `normalise_vqa`."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_vqa(one_line(text))


def one_line(text: str) -> str:
    """`text` with newlines and tabs as spaces, stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def soft_score(text: str, answers: Sequence[str]) -> float:
    """The agreement of `text` with people's answers: min(1, equal ones among the others / 3), a mean over all answers.

    "The others" are the answers without one, for each one in turn.
    """
    equal = sum(answer == text for answer in answers)
    shares = [min(1.0, (equal - (answer == text)) / 3) for answer in answers]
    return sum(shares) / len(shares)


def vqa_score(text: str, answers: Sequence[str]) -> float:
    """VQAv2's score: if the answers are not all the same string, both are normalised; else compared as written."""
    text, answers = one_line(text), [one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        text, answers = normalise_vqa(text), [normalise_vqa(answer) for answer in answers]
    return soft_score(text, answers)


def textvqa_score(text: str, answers: Sequence[str]) -> float:
    """TextVQA's score: EvalAI's processor on both sides."""
    return soft_score(normalise_evalai(text), [normalise_evalai(answer) for answer in answers])


def exact_score(text: str, answer: str) -> float:
    """GQA's score: 1 if `text` in lower case, without the periods at its end, is the answer."""
    return float(gqa_prediction(text) == answer)


def gqa_prediction(text: str) -> str:
    """An answer as GQA's result file has it."""
    return text.rstrip(".").lower()


def pope_says_yes(text: str) -> bool:
    """POPE's reading: no if No, no or not is a word of the first sentence, else yes (also for Not and NO)."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def mme_label(text: str) -> str:
    """MME's reading: yes or no if it is that word or stands in its first four letters (yes first), else other."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def scienceqa_letter(text: str) -> str:
    """ScienceQA's reading: the text is a letter, begins with "X. ", or holds "The answer is X." once; else empty."""
    if re.fullmatch("[A-E]", text) or re.match(r"[A-E]\. ", text):
        return text[0]
    letters = re.findall("The answer is ([A-Z]).", text)
    return letters[0] if len(letters) == 1 else ""
