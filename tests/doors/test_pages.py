"""What the pages show runs as shown, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

from tests import page_commands
from tests.page_commands import PAGES, commands, run
from tests.support.paths import ROOT

_LINKED = ["CONTRIBUTING.md", *PAGES]


@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in PAGES if next(commands(page), None)])
def test_the_commands_of_a_page_run_in_order(page: str, tmp_path: Path) -> None:
    """In the short form of `python -m tests.page_commands`; minutes of work, since each command is a process."""
    rows = list(run(page, tmp_path, short=True))
    assert [f"{row}\n{row.printed}" for row in rows if row.outcome.startswith("failed")] == []
    assert any(row.outcome.startswith("ok") for row in rows)


def test_a_command_that_does_not_run_as_written_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None)
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\npython -c 'import mlxtend'   # before its extra\nfolder=there\nmkdir $folder && cd \\\n  $folder\n"
        "mkdir ../there\npython gpu.py  # needs a GPU\n```\n```\nfalse\n```\n"
        "```sh\npip install -e '.[train]'\npython -c 'import mlxtend'\npip install mlxtend\n```\n"
        "```python\nimport dgfast\n\ndgfast.nonsense\n```\n"
    )
    (tmp_path / "run").mkdir()
    rows = list(run(str(page), tmp_path / "run", short=True))
    assert [(row.command.line, row.outcome) for row in rows] == [
        (0, "ok"), (2, "failed: 1"), (3, "ok"), (5, "ok"), (6, "failed: 1"), (7, "not run: needs a GPU"),
        (13, "ok"), (14, "ok"), (15, "failed: 1"), (18, "failed: 1"),
    ]  # fmt: skip
    assert "File exists" in rows[4].printed and "no attribute 'nonsense'" in rows[-1].printed


def test_every_substitution_is_of_a_command_that_a_page_has() -> None:
    texts = [command.text.partition(" # ")[0].strip() for page in PAGES for command in commands(page)]
    patterns = [pattern for pattern, _ in page_commands.SHORT]
    applied = {next((pattern for pattern in patterns if re.search(pattern, text)), "") for text in texts}
    assert applied - {""} == {*patterns}


@pytest.mark.parametrize("page", _LINKED)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for file, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), file
        titles = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_options_that_stand_in_a_row_of_a_table_exist() -> None:
    """A row's own options come after those of the command above its table, which the page's commands hold."""
    rows = re.findall(r"^\| `(--[^`]*)` \|", (ROOT / "docs/quality.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 10
    for options in rows:
        status, printed = page_commands.options_exist(f"dgfast sample {options} --help")
        assert status == 0, printed
