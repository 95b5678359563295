"""The pages of reports in a real browser, where Chromium is installed: no error, no request, nothing wider than a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from benchmark_outs import opposite, write_out
from report_pages import log_line, write_run
from tiny_runs import IMAGES, STUDENT

from alignkd.pipeline.config.benchmark_report import BenchmarkReportConfig
from alignkd.pipeline.config.report import ReportConfig
from alignkd.pipeline.report.benchmarks.report import benchmark_report
from alignkd.pipeline.report.run_page import report

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
OWN_SERVICES = (".google.com", ".googleapis.com")
"""Whom Chromium itself asks, whatever the page; no name is resolved, so nothing gets there."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


@pytest.fixture
def browse(tmp_path):
    """Opens a page; gives its document, what it wrote to the console, and the hosts that were asked for."""

    def open_page(path, *options):
        log = tmp_path / "net.json"
        quiet = ["no-first-run", "disable-background-networking", "disable-component-update", "disable-sync", "disable-quic"]
        words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *(f"--{word}" for word in quiet), *options]
        words += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}"]
        words += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        hosts = set(re.findall(r'"url":"[a-z]+://([^/":]+)', log.read_text()))
        return done.stdout, console, {host for host in hosts if not host.endswith(OWN_SERVICES)}

    return open_page


def width(browse, tmp_path, page, pixels):
    """How wide a page is on a screen of so many pixels."""
    outer = tmp_path / "outer.html"
    outer.write_text(
        f"<iframe id='f' style='border:0' width='{pixels}' height='900' src='{page.as_uri()}'></iframe><script>"
        "document.getElementById('f').onload = e => { document.title ="
        " `${e.target.contentDocument.documentElement.scrollWidth} px` }</script>"
    )
    document, _, _ = browse(outer, "--allow-file-access-from-files", "--disable-web-security")
    return int(re.search(r"<title>(\d+) px</title>", document)[1])


@pytest.fixture
def pages(run, data, tmp_path):
    """The page of a real run, and one of three runs side by side with text from others in it."""
    evil = "<script>console.error('ran')</script><img src='http://example.invalid/x.png'>" + "w" * 300
    other = write_run(
        tmp_path / "other",
        [log_line(step, **{f"eval/{evil}": 1.0 / step}) for step in range(1, 400)],
        result={"warnings": [evil]},
        student=str(STUDENT),
        data=str(data),
        images=str(IMAGES),
    )
    record = json.loads((other / "run.json").read_text())
    record["configuration"]["recipe"]["name"] = evil
    (other / "run.json").write_text(json.dumps(record))
    made = []
    for name, runs in (("one", [run]), ("three", [run, other, other])):
        figures = report(ReportConfig(runs=tuple(map(str, runs)), to=str(tmp_path / name), samples=2, device="cpu"))
        made.append(tmp_path / name / "report.html")
        assert figures["report"] == str(made[-1])
    return made


def test_a_page_asks_for_nothing_and_has_no_error_and_fits_a_phone(browse, pages, tmp_path):
    for page in pages:
        document, console, hosts = browse(page)
        assert "the command that repeats the run" in document
        assert console == []
        assert hosts == set()
        assert width(browse, tmp_path, page, 390) <= 390
        assert width(browse, tmp_path, page, 1280) <= 1280


def test_the_page_of_benchmarks_asks_for_nothing_and_has_no_error_and_fits_a_phone(browse, tmp_path):
    evil = "<script>console.error('ran')</script><img src='http://example.invalid/x.png'>" + "w" * 300
    outs = [
        write_out(tmp_path / "a", "runs/sft/student"),
        write_out(tmp_path / "b", f"models/{evil}", change=lambda place, text: opposite(text) if place % 3 == 0 else text),
        write_out(tmp_path / "c", "models/MobileVLM_V2-1.7B", names=("gqa", "mme"), dtype=evil),
    ]
    benchmark_report(BenchmarkReportConfig(outs=tuple(map(str, outs)), to=str(tmp_path / "to"), resamples=200))
    page = tmp_path / "to" / "report.html"
    page.write_text(page.read_text().replace("<details>", "<details open>"))  # all that a reader may open is looked at
    document, console, hosts = browse(page)
    assert "How the figures were found" in document
    assert console == []
    assert hosts == set()
    assert width(browse, tmp_path, page, 390) <= 390
    assert width(browse, tmp_path, page, 1280) <= 1280


def test_the_browser_would_tell(browse, tmp_path):
    (tmp_path / "bad.html").write_text("<img src='http://example.invalid/x.png'><script>console.error('ran')</script>")
    _, console, hosts = browse(tmp_path / "bad.html")
    assert any("ran" in line for line in console)
    assert "example.invalid" in hosts
    (tmp_path / "wide.html").write_text("<div style='width: 700px'>wide</div>")
    assert width(browse, tmp_path, tmp_path / "wide.html", 390) >= 700
