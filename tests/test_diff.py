"""What changed between two files with scores."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qsens import result_files, snapshot
from pytest_qsens.cli import main
from pytest_qsens.diff import KINDS, Diff, diff, of_result, of_snapshot
from pytest_qsens.ops import TOTAL
from pytest_qsens.report import diff as report_diff
from pytest_qsens.results import Cost, OpResult, RunInfo, RunResult
from pytest_qsens.snapshot import Entry, Snapshot
from pytest_qsens.thresholds import judge, parse_fail

if TYPE_CHECKING:
    from collections.abc import Mapping

NAMES = [f"layers.{block}.{name}" for block in (0, 2, 10) for name in ("up", "down")]
FAIL = parse_fail("nmse:5%")
HOSTILE = "layers.0.<script>alert('|`*')</script>"


def entry(nmse: float, **more: float) -> Entry:
    """Line of a linear layer."""
    return Entry("linear", {"nmse": nmse, **more})


def of(ops: Mapping[str, Entry], **more: str) -> Snapshot:
    """Snapshot of these lines."""
    return replace(Snapshot("m", "w8a8", {"torch": "2.13.0"}, ops), **more)  # type: ignore[arg-type] # texts alone


def compared(old: Snapshot, new: Snapshot, fail: str = "nmse:5%") -> Diff:
    """Diff of two snapshots."""
    return diff(of_snapshot(old, "old.json"), of_snapshot(new, "new.json"), parse_fail(fail))


SCORES = st.dictionaries(st.sampled_from([*NAMES, TOTAL]), st.floats(0, 1).map(entry), min_size=1)


@given(SCORES, SCORES)
def test_it_judges_as_the_gate_does(old: dict[str, Entry], new: dict[str, Entry]) -> None:
    """Every op of either file has one change: what the gate says of ops in both, else where it is."""
    said = {"regressed": "worse", "improved": "better", "ok": "same"}
    found = compared(of(old), of(new))
    assert {change.op for change in found.changes} == {*old, *new}
    assert len(found.changes) == len({*old, *new})
    for change in found.changes:
        if change.op not in old:
            assert change.kind == "appeared"
        elif change.op not in new:
            assert change.kind == "vanished"
        else:
            before, now = old[change.op].isolated, new[change.op].isolated
            assert before is not None
            assert now is not None
            assert change.kind == said[judge(before, now, FAIL, "isolated").kind]
    listed = [change for changes in found.blocks().values() for change in changes]
    assert sorted(listed, key=str) == sorted(found.changes, key=str)
    assert sum(found.count(kind) for kind in KINDS) == len({*old, *new} - {TOTAL})


def test_blocks_are_in_order_and_the_worst_comes_first() -> None:
    """Block 2 comes before 10, the whole model last; within a block what matters most comes first."""
    old = {"layers.10.up": entry(0.1), "layers.2.up": entry(0.1), "layers.2.down": entry(0.1), TOTAL: entry(0.5)}
    new = {"layers.10.up": entry(0.1), "layers.2.up": entry(0.2), "layers.2.down": entry(0.4), TOTAL: entry(0.1)}
    found = compared(of(old), of(new | {"layers.2.gate": entry(0.3)})).blocks()
    assert list(found) == ["layers.2", "layers.10", TOTAL]
    assert [change.op for change in found["layers.2"]] == ["layers.2.down", "layers.2.up", "layers.2.gate"]
    assert [change.ratio for change in found["layers.2"]] == [4.0, 2.0, None]


RUN = RunInfo("m", "w8a8", "delta", "isolated", {"torch": "2.13.0"}, Cost(1.0))


def measured(op: str, nmse: float) -> OpResult:
    """Make the result of a linear layer."""
    return OpResult(op, "linear", op.rpartition(".")[0], "measured", None, {"nmse": nmse})


def test_an_op_that_lost_its_score_says_why() -> None:
    """Ops without exact numbers are told with the reason, and estimates are no exact numbers."""
    old = RunResult(RUN, tuple(measured(name, 0.1) for name in NAMES[:3]))
    estimate = replace(measured(NAMES[2], 0.9), status="estimated", intervals={"isolated": (0.5, 1.5)})
    gone = OpResult(NAMES[1], "linear", "layers.0", "unexercised", "the data never reached it")
    new = RunResult(RUN, (measured(NAMES[0], 0.1), gone, estimate))
    found = diff(of_result(old, "a"), of_result(new, "b"), FAIL)
    assert [(change.kind, change.lines[-1]) for change in found.changes[1:]] == [
        ("lost", "now: unexercised: the data never reached it"),
        ("lost", "now: estimated"),
    ]
    assert found.count("same") == 1
    back = diff(of_result(new, "b"), of_result(old, "a"), FAIL)
    assert [change.kind for change in back.changes] == ["same", "appeared", "appeared"]


def test_ops_that_never_have_a_score_do_not_appear() -> None:
    """Products of attention are in a result, but in no snapshot; an op with a score does appear, and vanish."""
    product = OpResult("layers.0:qk", "qk", "layers.0", "unquantizable", "w8a8 does not quantize qk products")
    new = RunResult(RUN, (measured(NAMES[0], 0.1), product, measured(NAMES[1], 0.2)))
    snapshot = of_snapshot(of({NAMES[0]: entry(0.1), NAMES[2]: entry(0.1)}), "s.json")
    found = diff(snapshot, of_result(new, "r.json"), FAIL)
    assert {change.op: change.kind for change in found.changes} == {
        NAMES[0]: "same",
        NAMES[1]: "appeared",
        NAMES[2]: "vanished",
    }
    back = diff(of_result(new, "r.json"), snapshot, FAIL)
    assert {change.op: change.kind for change in back.changes}[NAMES[1]] == "vanished"
    assert product.op not in {change.op for change in back.changes}


def test_what_a_config_changes() -> None:
    """The scheme of an op is told where it changed; a threshold on gain is one on loss of what is added."""
    old = {NAMES[0]: replace(entry(0.1), scheme="w8a8"), NAMES[1]: Entry("linear", added={"nmse": 0.5, "loss": 0.1})}
    new = {NAMES[0]: replace(entry(0.2), scheme="w4a16"), NAMES[1]: Entry("linear", added={"nmse": 0.6, "loss": 0.2})}
    found = compared(of(old), of(new), "nmse:50%,gain:5%")
    assert [change.kind for change in found.changes] == ["worse", "worse"]
    assert found.changes[0].lines[0] == "scheme w8a8 → w4a16"
    assert found.changes[1].lines[0].startswith("added loss 0.1 → 0.2")


@pytest.mark.parametrize(
    ("old", "new", "note", "heading"),
    [
        ("w8a8", "quant", "scheme w8a8 → config quant", "m, config quant: old.json → new.json"),
        ("one", "two", "config one → two", "m, config two: old.json → new.json"),
        ("one", "w4a8_dynamic_g128", "config one → scheme w4a8_dynamic_g128", "m, scheme w4a8_dynamic_g128: *"),
    ],
)
def test_configs_are_called_so(old: str, new: str, note: str, heading: str) -> None:
    """A label is of a config if it is not that of a scheme."""
    entries = {NAMES[0]: entry(0.1)}
    found = compared(of(entries, scheme=old), of(entries, scheme=new))
    assert found.notes == (note,)
    assert fnmatch(next(report_diff.text(found, FAIL, everything=False)), heading)


def test_a_part_of_a_run_takes_no_score_away() -> None:
    """What was not selected is not run, which is no loss; a metric of one file alone is told."""
    new = RunResult(RUN, (measured(NAMES[0], 0.1), OpResult(NAMES[1], "linear", "layers.0", "unrun", "not selected")))
    old = of({NAMES[0]: entry(0.1, kl=0.2), NAMES[1]: entry(0.1)})
    found = diff(of_snapshot(old, "s.json"), of_result(new, "r.json"), parse_fail("nmse:5%,kl:5%"))
    assert [change.kind for change in found.changes] == ["same", "unrun"]
    assert "kl is in s.json only, and not compared" in found.notes


def test_a_result_against_the_snapshot_of_other_data() -> None:
    """Differences that sampling explains count as none, if the data differ, as in a gate."""
    here = {**RUN.environment, "evaluation": "a"}
    noisy = replace(measured(NAMES[0], 0.12), isolated={"nmse": 0.12, "stderr": 0.02, "samples": 16.0})
    new = of_result(RunResult(replace(RUN, environment=here), (noisy,)), "r.json")
    for evaluation, kind in (("a", "worse"), ("b", "same")):
        old = of_snapshot(of({NAMES[0]: entry(0.1)}), "s.json")
        (change,) = diff(replace(old, environment={**here, "evaluation": evaluation}), new, FAIL).changes
        assert change.kind == kind


def test_a_mode_that_is_missing_is_told() -> None:
    """Only what both have is compared; an op that has lost one of two modes has lost a score."""
    both = Entry("linear", {"nmse": 0.1}, {"nmse": 0.5})
    found = compared(of({NAMES[0]: both}), of({NAMES[0]: entry(0.1)}))
    assert (found.modes, found.count("same")) == (("isolated",), 1)
    assert "fallback scores are in old.json only, and not compared" in found.notes
    found = compared(of({NAMES[0]: both, NAMES[1]: both}), of({NAMES[0]: both, NAMES[1]: entry(0.1)}))
    assert [change.kind for change in found.changes] == ["same", "lost"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two snapshots, the second one with a hostile name in it."""
    monkeypatch.chdir(tmp_path)
    old = of({NAMES[0]: entry(0.1), NAMES[1]: entry(0.1)})
    new = of({NAMES[0]: entry(0.2), NAMES[1]: entry(0.1), HOSTILE: entry(0.3)}, scheme="w8a8_static")
    Path("old.json").write_text(snapshot.dumps(old))
    Path("new.json").write_text(snapshot.dumps(new))
    return tmp_path


def test_the_terminal(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What changed, by block, and nothing else unless it is asked for; the exit code only if it is."""
    assert main(["diff", "old.json", "new.json"]) == 0
    assert capsys.readouterr().out == (
        "m, scheme w8a8_static: old.json → new.json\n"
        "by nmse:5%, isolated; higher is worse, but for sqnr_db and top1\n"
        "note: scheme w8a8 → w8a8_static\n"
        "3 ops: 1 worse, 1 new, 1 as before\n"
        "\n"
        "layers.0: 1 worse, 1 new, 1 as before\n"
        "  worse     layers.0.up\n"
        "            isolated nmse 0.1 → 0.2 (+100.0 %, limit 0.105 = +5 %)\n"
        f"  appeared  {HOSTILE}\n"
        "            isolated nmse 0.3\n"
    )
    assert main(["diff", "old.json", "new.json", "--all", "--exit-code"]) == 1
    assert "  same      layers.0.down\n" in capsys.readouterr().out
    assert main(["diff", "old.json", "old.json", "--exit-code"]) == 0
    assert files.joinpath("old.json").exists()


class Page(HTMLParser):
    """Tags and texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002, D102 - the base's
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:  # noqa: D102 - the base's
        self.texts.append(data)


@pytest.mark.usefixtures("files")
def test_names_are_text_wherever_they_go(capsys: pytest.CaptureFixture[str]) -> None:
    """HTML and Markdown show them, and do nothing else with them; JSON holds all ops."""
    assert main(["diff", "old.json", "new.json", "--format", "html", "-o", "diff.html"]) == 0
    page = Page()
    page.feed(Path("diff.html").read_text())
    assert HOSTILE in page.texts
    assert "script" not in page.tags
    assert "table" in page.tags
    capsys.readouterr()
    assert main(["diff", "old.json", "new.json", "--format", "markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if "alert" in line]
    assert "<script" not in row
    assert row.count("|") - row.count("\\|") == 5
    assert main(["diff", "old.json", "new.json", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {op["op"]: op["change"] for op in document["ops"]}[HOSTILE] == "appeared"
    assert document["counts"] | {"worse": 1, "same": 1, "appeared": 1} == document["counts"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_revisions_of_a_snapshot(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Git's own way to name a file of a revision, and a revision alone, from any directory."""

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=n", "-c", "user.email=e@example.com")
        subprocess.run(["git", *who, *arguments], check=True, capture_output=True)

    git("init", "-q")
    git("add", "old.json")
    git("commit", "-q", "-m", "first")
    shutil.copy("new.json", "old.json")
    for arguments in (("HEAD", "old.json"), ("HEAD:old.json", "old.json"), ("HEAD", str(files / "old.json"))):
        assert main(["diff", *arguments]) == 0
        assert "3 ops: 1 worse, 1 new, 1 as before" in capsys.readouterr().out
    for wrong, what in (("nowhere", "git has no nowhere"), ("-p", "is no revision"), ("HEAD:none.json", "git has no")):
        assert main(["diff", "--", wrong, "old.json"]) == 4
        assert what in capsys.readouterr().err
    assert main(["diff", "HEAD:./", "old.json"]) == 4, "a directory of a revision is no file of it"
    assert "git has no HEAD:./" in capsys.readouterr().err
    assert main(["diff", "HEAD", "."]) == 4
    assert ". is a directory. Give one of its files, such as" in capsys.readouterr().err


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.json", "none.json"), "there is no file none.json"),
        (("old.json", "other.json"), "old.json is of model 'm', other.json of 'n'"),
        (("old.json", "groups.json"), "is of granularity 'op', groups.json of 'fused'"),
        (("old.json", "empty.json"), "old.json has isolated scores, empty.json no"),
        (("old.json", "list.json"), "neither a result file"),
        (("old.json", "new.json", "--fail", "kl:1%"), "kl is in neither file"),
        (("old.json", "new.json", "--fail", "nmse:x"), "'x' is not an amount for nmse"),
        (("old.json", "new.json", "-o", "nowhere/d.html"), "nowhere"),
    ],
)
def test_what_cannot_be(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is told with what is wrong, and nothing is written."""
    Path("other.json").write_text(snapshot.dumps(of({NAMES[0]: entry(0.1)}, model="n")))
    Path("groups.json").write_text(snapshot.dumps(of({NAMES[0]: entry(0.1)}, granularity="fused")))
    Path("empty.json").write_text(result_files.dump(RunResult(RUN, ())))
    Path("list.json").write_text("[]")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert main(["diff", *arguments]) == 4
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
