"""Addresses of images: bounded in time and size, and never of this machine unless asked."""

import http.server
import threading
import time

import pytest

from segcompass.modeling_segcompass.web_images import fetch


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        for _ in range(100 if self.path == "/slow" else 1):
            self.wfile.write(b"x" * (10 if self.path == "/slow" else 5000))
            self.wfile.flush()
            time.sleep(0.05 if self.path == "/slow" else 0)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_only_asked_for_is_this_machine_read(site, monkeypatch):
    monkeypatch.delenv("SEGCOMPASS_LOCAL_URLS", raising=False)
    for host in (site, site.replace("127.0.0.1", "localhost"), site.replace("127.0.0.1", "0.0.0.0")):
        with pytest.raises(ValueError, match="lies in a local network.*SEGCOMPASS_LOCAL_URLS=1"):
            fetch(f"{host}/a")
    monkeypatch.setenv("SEGCOMPASS_LOCAL_URLS", "1")
    assert fetch(f"{site}/a") == b"x" * 5000
    assert fetch(f"{site}/to/{site}/a") == b"x" * 5000, "redirects are followed"


def test_redirects_lead_to_http_alone(site, monkeypatch):
    monkeypatch.setenv("SEGCOMPASS_LOCAL_URLS", "1")
    for target in ("file:///etc/hostname", "ftp://example.org/a"):
        with pytest.raises((ValueError, OSError), match="is not http or https|is not allowed"):
            fetch(f"{site}/to/{target}")


def test_size_and_time_are_bounded(site, monkeypatch):
    monkeypatch.setenv("SEGCOMPASS_LOCAL_URLS", "1")
    with pytest.raises(ValueError, match="more than 4,999 bytes"):
        fetch(f"{site}/a", max_bytes=4999)
    began = time.monotonic()
    with pytest.raises(OSError, match="took longer than 0.3 s"):
        fetch(f"{site}/slow", total=0.3)
    assert time.monotonic() - began < 4.5, "the answer takes 5 s in all"
