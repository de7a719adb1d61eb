"""The verdict at the end of an export: what it reads is checked first, and another one is given if it is asked for."""

import shutil

import pytest

pytest.importorskip("onnxruntime_qnn", reason="needs the extra `qnn`")

from tiny_qnn import SETTINGS, requests, save_pair

from conversion.qnn import export as export_module
from conversion.qnn.bundle.export_state import UnfinishedExport
from conversion.qnn.bundle.metadata import Bundle
from conversion.qnn.export import export_bundle
from conversion.qnn.verdict import judged_on


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


class EvalData:
    """Held-out chats whose answers nobody reads."""

    def __init__(self, *digests, problem=None):
        self.digests, self.problem = digests, problem

    def check(self, *_facts):
        if self.problem is not None:
            raise self.problem

    def answers(self, _model, _runner):
        return {}


@pytest.mark.slow
def test_a_finished_bundle_is_kept_for_another_verdict(pair, tmp_path, monkeypatch, caplog):
    asked, out = [], tmp_path / "bundle"

    def judge(_model, _folder, _held_out, answers, accept_loss, _remarks):
        asked.append((answers and answers.__self__, accept_loss))
        if len(asked) == 1:
            raise ValueError("a verdict that cannot be given")
        if len(asked) == 2:
            (out / "mine").mkdir(parents=True)  # by somebody else, while the export runs
        found = {"result": "failed", "accepted": accept_loss, "reasons": [], "remarks": []}
        return {**found, "logits": {}, "answers": None}

    def export(**options):
        export_bundle(pair, out, calibration=requests(), **SETTINGS, **options)

    monkeypatch.setattr(export_module, "judge", judge)
    with pytest.raises(ValueError, match="^a verdict that cannot be given$"):
        export()
    assert "kept in" in caplog.text and "bundle.unfinished: the same command goes on with the verdict" in caplog.text
    monkeypatch.setattr(export_module, "compile_graphs", None)
    with pytest.raises(FileExistsError, match=r"bundle appeared while .*: move it away.* kept in .*\.unfinished\."):
        export()
    shutil.rmtree(out)
    with monkeypatch.context() as patched, pytest.raises(KeyError):
        patched.setattr(UnfinishedExport, "hand_over", lambda _self: {}["stopped"])
        export()
    assert asked == [(None, False)] * 2
    other = EvalData("others")
    export(eval_data=other, accept_loss=True)
    assert asked[2:] == [(other, True)]
    assert Bundle(out).metadata["verdict"]["accepted"] and Bundle(out).changed_files() == []
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_a_verdict_cannot_read_is_found_before_anything_is_made(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module._Export, "run", lambda *_: pytest.fail("work began"))
    eval_data = EvalData(problem=ValueError("held-out.jsonl:3: bad image"))
    with pytest.raises(ValueError, match="held-out.jsonl:3: bad image"):
        export_bundle(pair, tmp_path / "out", calibration=requests(1), eval_data=eval_data, **SETTINGS)
    with pytest.raises(ZeroDivisionError):
        held_out = (1 // number for number in (1, 0))
        export_bundle(pair, tmp_path / "out", calibration=requests(1), held_out=held_out, **SETTINGS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change", [{"eval_data": EvalData("b")}, {"eval_data": None}, {"accept_loss": True}, {"remarks": ["too kind"]},
               {"held_out": requests(2)[:2]}]
)  # fmt: skip
def test_a_verdict_depends_on_all_that_is_asked(tmp_path, change):
    work = UnfinishedExport(tmp_path / "out")
    same = {"held_out": requests(2)[2:], "eval_data": EvalData("a"), "accept_loss": False, "remarks": []}
    with work.judged_on(judged_on(**same)):
        assert not work.is_judged_on(judged_on(**same))
    assert work.is_judged_on(judged_on(**{**same, "held_out": requests(2)[2:], "eval_data": EvalData("a")}))
    assert not work.is_judged_on(judged_on(**{**same, **change}))
