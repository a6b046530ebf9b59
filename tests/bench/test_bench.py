"""What the benchmarks promise: no wrong result is timed, and peak memory is what was allocated."""

import json
from dataclasses import replace

import pytest
import torch

from npo_fast.bench import memory, provenance, scaling
from npo_fast.bench.candidates import OURS, Candidate, find_candidates
from npo_fast.bench.fp64_oracle import HEADS, Oracle
from npo_fast.bench.inputs import KINDS, Shape, make_inputs
from npo_fast.bench.loss import WrongResultError, bench, check
from npo_fast.cli import main
from tests.helpers import exit_code

CPU = torch.device("cpu")
SHAPE = Shape("tiny", rows=96, width=32, vocabulary=500, sequences=5)
SIZES = ["--rows", "64", "--width", "32", "--vocabulary", "500", "--sequences", "4"]


def candidate(loss: str = "NPO") -> Candidate:
    return next(c for c in find_candidates(CPU, [])[0] if c.loss == loss)


def needs_high_water_mark() -> None:
    try:
        memory.peak_bytes(lambda: None, CPU)
    except memory.MemoryUnknownError as error:
        pytest.skip(str(error))


def misplaced_label(inputs):
    labels = inputs.labels.clone()
    labels[-1] = (labels[-1] + 1) % inputs.shape.vocabulary
    return candidate().run(replace(inputs, labels=labels))


def frozen_head(inputs):
    return candidate().run(replace(inputs, weight=inputs.weight.detach())) + 0 * inputs.weight.sum()


def doubled_gradient(inputs):
    loss = candidate().run(inputs)
    return 2 * loss - loss.detach()


def wrong_without_gradients(inputs):
    loss = candidate().run(inputs)
    return loss if torch.is_grad_enabled() else loss + 1


BROKEN = [
    misplaced_label, frozen_head, doubled_gradient, wrong_without_gradients,
    lambda inputs: candidate().run(inputs) * torch.nan,
]  # fmt: skip


@pytest.mark.parametrize("run", BROKEN)
def test_a_wrong_result_is_refused(run):
    inputs = make_inputs(SHAPE, "random", CPU)
    with pytest.raises(WrongResultError, match="relative errors against fp64"):
        check(Candidate("broken", "NPO", run), inputs, Oracle(inputs))


def test_a_wrong_result_is_reported_and_not_timed(monkeypatch):
    monkeypatch.setattr("npo_fast.bench.loss.peak_mib", lambda *_: {})
    broken = Candidate("broken", "NPO", doubled_gradient)
    raising = Candidate("raising", "NPO", lambda inputs: 1 / 0)
    said = []
    result = bench(SHAPE, [candidate(), broken, raising], ["random"], 1, CPU, said.append)
    assert [row.peer for row in result.rows] == [OURS]
    assert set(result.refused) == {"broken NPO", "raising NPO"}
    assert "ZeroDivisionError" in result.refused["raising NPO"]
    assert not result.ours_refused


def test_an_internal_error_is_not_hidden(monkeypatch):
    ours = Candidate(OURS, "NPO", lambda inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench(SHAPE, [ours], ["random"], 1, CPU, print)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_results_are_accepted_on_all_inputs(kind, dtype):
    inputs = make_inputs(replace(SHAPE, dtype=dtype), kind, CPU)
    oracle = Oracle(inputs)
    for one in find_candidates(CPU, [])[0]:
        check(one, inputs, oracle)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_the_oracle_is_autograd_in_fp64(kind, head):
    inputs = make_inputs(SHAPE, kind, CPU)
    hidden = inputs.hidden.detach().double().requires_grad_()
    weight = inputs.weight.detach().double().requires_grad_()
    log_probs = (hidden @ weight.T).log_softmax(-1).gather(1, inputs.labels[:, None]).squeeze(1)
    loss = HEADS[head](log_probs, inputs)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    errors = Oracle(inputs).errors(head, loss, *gradients)
    assert max(errors.loss, errors.hidden_gradient, errors.weight_gradient) < 1e-9


def test_inputs_are_what_their_kind_says():
    log_probs = {kind: Oracle(make_inputs(SHAPE, kind, CPU)).log_probs for kind in KINDS}
    assert log_probs["memorised"].median() > -0.01
    assert log_probs["random"].mean() < -5
    forgotten = make_inputs(SHAPE, "forgotten", CPU)
    sequences = torch.zeros(5, dtype=torch.float64)
    sequences.index_add_(0, forgotten.sequence_of, log_probs["forgotten"])
    assert (sequences - forgotten.ref_log_probs).max() < -200


@pytest.mark.slow
def test_peak_memory_sees_an_allocation():
    needs_high_water_mark()
    size = 256 << 20

    def allocate() -> None:
        torch.ones(size, dtype=torch.uint8)

    assert memory.peak_bytes(allocate, CPU) == pytest.approx(size, rel=0.2)


@pytest.mark.slow
def test_peak_memory_counts_beyond_the_outputs():
    needs_high_water_mark()
    shape = Shape("small", rows=1024, width=32, vocabulary=32768, sequences=8)
    candidates, _ = find_candidates(CPU, ["plain"])
    plain = next(c for c in candidates if c.peer == "plain" and c.loss == "NPO")
    peak = memory.peak_mib(plain, shape, CPU)
    logits_mib = shape.logits_bytes / memory.MIB
    # plain PyTorch keeps logits and log-softmax, and the gradients of both meet
    assert 1.8 * logits_mib < peak["forward_peak_mib"] < 2.4 * logits_mib
    assert 1.8 * logits_mib < peak["train_peak_mib"] < 4.4 * logits_mib


@pytest.mark.slow
def test_the_command_prints_one_json_object(capsys, tmp_path):
    file = tmp_path / "deeper/loss.json"
    arguments = [*SIZES, "--rounds", "1", "--peers", "plain,torch-lce", "--output", str(file)]
    assert main(["bench", "loss", *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(file.read_text())
    assert result["provenance"]["versions"]["torch"] == torch.__version__
    (shape,) = result["results"]
    rows = shape["rows"]
    assert {(row["inputs"], row["loss"]) for row in rows if row["peer"] == OURS} == {
        (kind, loss) for kind in KINDS for loss in ("NPO", "NLL")
    }
    assert all(row["train_ms"] > 0 and row["train_ratio"] > 0 for row in rows)


def test_the_command_as_text_names_who_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("npo_fast.bench.loss.peak_mib", lambda *_: {})
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    assert main(["bench", "loss", *SIZES, "--rounds", "1", "--peers", "trl"]) == 0
    out, err = capsys.readouterr()
    assert "three bare GEMMs" in out
    assert "trl is left out" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "nobody"], "unknown peer 'nobody'"),
        (["--inputs", "noise"], "--inputs: unknown 'noise'"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--rows", "0"], "rows must be at least 1, got 0"),
        (["--rows", "2", "--sequences", "3"], "--sequences 3 is more than --rows 2"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, capsys):
    assert exit_code(["bench", "loss", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_scaling_writes_points_and_a_plot(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("npo_fast.bench.loss.peak_mib", lambda *_: {"train_peak_mib": 1.0})
    file = tmp_path / "scaling.json"
    assert main(["bench", "loss", "--scaling", *SIZES, "--rounds", "1", "--json",
                 "--output", str(file)]) == 0  # fmt: skip
    points = json.loads(capsys.readouterr().out)["points"]
    assert {p["rows"] for p in points if p["axis"] == "rows"} == set(scaling.halves(64))
    assert {p["vocabulary"] for p in points if p["axis"] == "vocabulary"} == set(
        scaling.halves(500)
    )
    assert file.with_suffix(".png").stat().st_size > 10_000


def test_kernel_floors_add_up_to_steps():
    pytest.importorskip("triton")
    from npo_fast.bench.kernels import predict
    from npo_fast.kernels.triton.offline import Record, h100_floor_ms
    from npo_fast.kernels.triton.variants import variants

    records = [
        Record(v.kernel, v.name, v.dtype, v.target, v.config, 0, 0, 0, 0, 0,
               h100_floor_ms(0.0, v.moved_bytes) if v.moved_bytes else None)
        for v in variants("sm_90")
    ]  # fmt: skip
    floors = predict(records)
    assert floors["three_gemms_ms"] == pytest.approx(13.04, rel=1e-2)
    logits_ms = 1e3 * 2 * 4096 * 128256 / 3.35e12
    # the loss goes three times through the logits beside the GEMMs
    assert floors["fused_loss_ms"] - floors["three_gemms_ms"] == pytest.approx(
        3 * logits_ms, rel=1e-3
    )


def test_results_say_which_commit_they_are_of(tmp_path, monkeypatch):
    assert provenance.provenance()["versions"]["torch"] == torch.__version__
    monkeypatch.setattr(provenance.npo_fast, "__file__", str(tmp_path / "npo_fast/__init__.py"))
    assert provenance.git_commit() is None, "installed"
