"""Access from other machines: host names and the token, on the real application, and on a real `um3 serve`."""

import pytest
from starlette.testclient import TestClient

from tests.um3.web.conftest import serving
from um3.core.errors import UserError
from um3.web.security import check_host_names
from um3.web.server import build_app

TOKEN = "a-token_of-43-characters"


@pytest.fixture
def remote(web_pipeline):
    """The application as other machines reach it: by the name gpu.example.org, by any address, with a token."""
    access = {"open_to_others": True, "allow_hosts": ["GPU.example.org"], "token": TOKEN}
    app = build_app(web_pipeline, sampling={}, max_waiting=1, **access)
    return TestClient(app, base_url="http://gpu.example.org:8000", follow_redirects=False)


PATHS = ("/", "/page.js", "/api/model", "/absent", "/?token=", "/?token=wrong", f"/api/model?token={TOKEN}")
AUTHORIZATIONS = ("", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, "Bearer é", f"Bearer {TOKEN}x")
COOKIES = ("um3=1", '=;=;"', "x" * 9000, f"token={TOKEN}", f"other={TOKEN}")


@pytest.mark.parametrize(
    ("path", "header", "value"),
    [(path, "Accept", "*/*") for path in PATHS]
    + [("/api/model", "Authorization", value) for value in AUTHORIZATIONS]
    + [("/api/model", "Cookie", value) for value in COOKIES],
)
def test_a_request_without_the_token_is_refused(remote, path, header, value):
    answer = remote.get(path, headers={header: value.encode()})
    assert answer.status_code == 401 and "lacks the server's token" in answer.json()["error"]
    assert "set-cookie" not in answer.headers and TOKEN not in answer.text


def test_the_printed_address_sets_a_cookie_and_leads_to_the_page_without_the_token(remote):
    answer = remote.get(f"/?token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie and answer.headers["referrer-policy"] == "no-referrer"
    for path in ("/", "/page.js", "/page.css", "/api/model"):
        assert remote.get(path).status_code == 200
    remote.cookies.clear()
    assert remote.get("/api/model").status_code == 401


OWN_HOSTS = ("gpu.example.org", "GPU.EXAMPLE.ORG:443", "192.168.0.7:8000", "localhost", "[::1]:8000")
OTHER_HOSTS = ("evil.example", "gpu.example.org.evil.example", "example.org", "evil.gpu.example.org", "")


@pytest.mark.parametrize("host", [*OWN_HOSTS, *OTHER_HOSTS])
def test_only_allowed_names_and_addresses_are_answered(remote, host):
    answer = remote.get("/api/model", headers={"Host": host, "Authorization": f"bearer {TOKEN}"})
    assert answer.status_code == (200 if host in OWN_HOSTS else 403)
    assert host in OWN_HOSTS or "does not answer to the host name" in answer.json()["error"]


def test_a_page_of_another_site_is_refused_even_with_the_token(remote):
    own = {"Authorization": f"Bearer {TOKEN}"}
    for origin, status in (
        ("https://gpu.example.org:8000", 400),  # behind a proxy that speaks TLS
        ("http://gpu.example.org:8000", 400),
        ("https://gpu.example.org", 403),
        ("https://evil.example", 403),
    ):
        answer = remote.post("/api/generate", json={"prompt": " "}, headers=own | {"Origin": origin})
        assert answer.status_code == status


@pytest.mark.parametrize("name", ["", "http://a.org", "a.org:80", "a.org/", "*.a.org", "a b", "-a.org", "é.org"])
def test_a_host_name_that_is_none_is_an_error(name):
    with pytest.raises(UserError, match="is not a host name; give the name alone"):
        check_host_names([name])


def test_a_server_for_other_machines_prints_its_token(web_model, tmp_path):
    with serving(web_model, tmp_path, "--host", "0.0.0.0", "--allow-host", "gpu.example.org") as server:
        assert server.process.stdout.readline() == "from other machines, replace 127.0.0.1 by gpu.example.org\n"
        own = {"Authorization": f"Bearer {server.token}"}
        assert len(server.token) >= 43
        assert server.request("GET", "/api/model").status == 401
        assert server.request("GET", "/api/model", headers=own).status == 200
        assert server.request("GET", "/api/model", headers=own | {"Host": "gpu.example.org"}).status == 200
        assert server.request("GET", "/api/model", headers=own | {"Host": "evil.example"}).status == 403
        assert server.request("GET", f"/?token={server.token}").status == 303
        assert server.token not in server.log.read_text()
