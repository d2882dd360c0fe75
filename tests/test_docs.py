"""What the documents say: code that compiles, commands that exist, files that are there, and an example that runs."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from ranks import run_script
from rule_check import Sample, check, leaves

from autopar.cli import main
from passes.rules.table import RULES

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    """(document, text) of every fenced block in a language."""
    return [
        (document.name, text)
        for document in DOCUMENTS
        for found, text in FENCE.findall(document.read_text())
        if found == language
    ]


def commands() -> list[str]:
    """Every line of every shell block, without comments and continuations."""
    joined = "\n".join(text.replace("\\\n", " ") for _, text in blocks("bash"))
    lines = (line.split("  #")[0].strip() for line in joined.splitlines())
    return sorted({line for line in lines if line and not line.startswith("#")})


def test_there_is_something_to_test() -> None:
    assert blocks("python")
    assert {"make demo", "make test"} <= set(commands())


@pytest.mark.parametrize(("document", "text"), blocks("python"))
def test_python_blocks_compile(document: str, text: str) -> None:
    compile(text, document, "exec")


def test_the_script_uses_what_there_is() -> None:
    import autopar

    used = {name for _, text in blocks("python") for name in re.findall(r"autopar\.(\w+)", text)}
    assert used
    assert not [name for name in used - set(dir(autopar)) if importlib.util.find_spec(f"autopar.{name}") is None]


@pytest.mark.parametrize("command", commands())
def test_commands_name_what_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in command.split() if "=" not in word or not word.split("=")[0].isupper()]
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "autopar":
        assert main([words[1], "--help"]) == 0
        told = capsys.readouterr().out
        wanted = {word.split("=")[0] for word in words if word.startswith("--")}
        assert not [option for option in wanted if option not in told]
    elif words[0] in ("python", "torchrun") and "examples/" not in command and "benchmarks/" not in command:
        assert "script.py" in words  # written by the line before
    elif words[0] in ("python", "torchrun"):
        (script,) = (word for word in words if word.endswith(".py"))
        assert (ROOT / script).exists()
        source = (ROOT / script).read_text()
        options = [word.split("=")[0] for word in words[words.index(script) + 1 :] if word.startswith("--")]
        assert not [option for option in options if f'"{option}"' not in source]
    else:
        assert words[0] == "pip"


def test_files_that_are_named_exist() -> None:
    packages = {path.name for package in ("autopar", "passes", "costmodel") for path in (ROOT / package).rglob("*.py")}
    for document in DOCUMENTS:
        for name in re.findall(r"`([\w/.-]+\.(?:py|txt))`", document.read_text()):
            assert (ROOT / name).exists() or (ROOT / "docs" / name).exists() or name in packages, (document.name, name)


def test_the_map_has_every_folder_and_every_file_outside_of_them() -> None:
    told = (ROOT / "docs" / "design.md").read_text()
    for package in (ROOT / name for name in ("autopar", "passes", "costmodel")):
        folders = [path.parent.relative_to(ROOT) for path in package.glob("*/__init__.py")]
        assert [folder for folder in folders if f"`{folder}/`" not in told] == []
        assert [path.name for path in package.glob("[!_]*.py") if not re.search(rf"[`/]{path.name}`", told)] == []


def test_a_folder_says_where_to_start() -> None:
    for package in ("autopar", "passes"):
        for first in (ROOT / package).glob("*/__init__.py"):
            told = ast.get_docstring(ast.parse(first.read_text()))
            assert told, first
            for name in re.findall(r"`(\w+\.py)`", told):
                assert (first.parent / name).exists(), (first, name)


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), (document.name, target)


def test_measured_figures_are_those_of_the_results() -> None:
    """What the page on strategies says of memory, and the page of figures of planning, beside the tables it is from."""
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (ROOT / "benchmarks" / "memory_results.md").read_text().splitlines()
        if line.startswith("| llama ")
    ]
    rows = {row[4]: row[5:8] for row in cells if row[1] == "megatron" and row[3] == "compiled"}
    whole, again, full, both = (
        rows[how] for how in ("pointwise", "pointwise, gathered again", "full", "full, gathered again")
    )
    page = " ".join((ROOT / "docs" / "strategies.md").read_text().split())
    assert f"takes {again[0]} MiB for {whole[0]}, and {both[0]} for {full[0]} with full recompute" in page
    worst = max(abs(float(row[2].rstrip("%"))) for row in (whole, again, full, both))
    assert f"each predicted to {worst}% or better" in page
    (line,) = (
        line for line in (ROOT / "benchmarks" / "planning_results.md").read_text().splitlines()
        if line.startswith("| after capture, with memory to spare, to a quarter")
    )  # fmt: skip
    times = [float(cell) for cell in line.split("|")[2:-1] if cell.strip()]
    assert f"costs {min(times):.2f} to {max(times):.2f} times (405B)" in (ROOT / "docs" / "measured.md").read_text()


def test_dependencies_have_their_reasons() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    reasons = (ROOT / "docs" / "design.md").read_text()
    required = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert required is not None
    for name in re.findall(r'"(\w+)[><=!]', required[1]):
        assert f"| {name} |" in reasons, name


# -- pages that a reader follows ---------------------------------------------------------------------------------------

PAGES = sorted({document for document, _ in blocks("bash")} - {"README.md"})
"""All that have commands, but for the README: see below."""


def steps(page: str) -> list[tuple[str, int]]:
    """(command, exit code) of every line in a page's shell blocks; a comment `# exits 1` says so."""
    text = "\n".join(block for document, block in blocks("bash") if document == page).replace("\\\n", " ")
    found = []
    for line in filter(None, text.splitlines()):
        command, _, comment = line.partition("  #")
        found.append((command.strip(), 1 if comment.strip().startswith("exits 1") else 0))
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_work_one_after_another(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    assert steps(page)
    for command, code in steps(page):
        words = shlex.split(command)
        if words[0] == "autopar":
            assert main(words[1:]) == code, (command, capfd.readouterr().err)
        elif words[0] == "torchrun":  # its ranks as forks; the demo's test has those that it starts
            ranks, script = int(words[1].removeprefix("--nproc-per-node=")), words[2]
            printed = run_script(ranks, tmp_path / script, *words[3:], folder=tmp_path)
            assert is_training(printed, learns=script == "examples/train.py")
        else:
            assert words[0] == "make"


def is_training(printed: str, *, learns: bool) -> bool:
    """Whether losses were printed, and, of text that can be learnt, whether they fall from about log 256."""
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]
    return len(losses) > 1 and (not learns or (5 < losses[0] < 6.5 and losses[-1] < losses[0] - 0.3))


def without_lines(report: str) -> str:
    """Without the line numbers of places in a model's source, which differ by its version."""
    return re.sub(r"(\.py):\d+", r"\1", report)


LONG = ("autopar search", "autopar calibrate")
"""Of the README's, half a minute of a core each; other pages and tests run these commands on smaller models."""


def test_the_readmes_commands_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    ran = [command for command, _ in steps("README.md") if command.startswith("autopar ")]
    assert len(ran) >= 4
    printed = ""
    for command in ran:
        if not command.startswith(LONG):
            assert main(shlex.split(command)[1:]) == 0, (command, capfd.readouterr().err)
            printed = printed or capfd.readouterr().out
    readme = (ROOT / "README.md").read_text()
    (shown,) = (text for document, text in blocks("text") if document == "README.md")
    if os.environ.get("AUTOPAR_README"):
        (ROOT / "README.md").write_text(readme.replace(shown, cut_short(printed)))
    else:
        now = cut_short(printed)
        assert without_lines(shown) == without_lines(now), "AUTOPAR_README=1 writes the report into the README"


def cut_short(report: str) -> str:
    """A report as the README has it: five lines of the ledger's first table, and one entry of its second."""
    before, state, rest = report.partition("  State:\n")
    state_lines, middle, rest = rest.partition("  Activations,")
    activations, last, end = rest.partition("-- What was replicated")
    first = activations.splitlines()
    second = next(i for i, line in enumerate(first[4:], 4) if not line.startswith("      "))
    shown = [*state_lines.splitlines()[:7], "  ...", ""]
    return (
        before
        + state
        + "\n".join(shown)
        + "\n"
        + middle
        + "\n".join([*first[:second], "  ...", ""])
        + "\n"
        + last
        + end
    )


def test_the_rule_of_the_page_is_right() -> None:
    (text,) = (block for document, block in blocks("python") if document == "adding-a-rule.md")
    exec(compile(text, "adding-a-rule.md", "exec"), {"__name__": "page"})
    sample = Sample(torch.ops.mine.scaled_softmax.default, (torch.randn(6, 5), torch.randn(6)), splits=1)
    try:
        assert check(sample, (2,)) > 1
        assert leaves(sample) == 1
    finally:
        del RULES[sample.target]
