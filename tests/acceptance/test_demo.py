"""`stenogate demo`, as a stranger runs it."""

from __future__ import annotations

import os
import subprocess
import sys


def test_the_demo_shows_speech_become_text_and_the_bill_for_it() -> None:
    environment = {**os.environ, "COLUMNS": "160"}
    demo = subprocess.run(
        [sys.executable, "-m", "gateway", "demo"],
        check=False,
        capture_output=True,
        text=True,
        timeout=150,
        env=environment,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    for spoken in (
        "six seven hundred one",
        "we need to cancel the address before friday",
        "today is friday january five",
    ):
        assert spoken in demo.stdout
    assert "partial" in demo.stdout
    assert "completed" in demo.stdout  # the job
    assert " 0 ms apart" in demo.stdout  # the statement agrees with the ledger
    assert "✗" not in demo.stdout
