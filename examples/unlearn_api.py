"""Unlearn, evaluate, report: python examples/unlearn_api.py MODEL FORGET.jsonl RETAIN.jsonl OUTPUT

OUTPUT is a new folder. It gets the run with its model in OUTPUT/run, its logs in OUTPUT/run/eval
and a page about it, OUTPUT/report.html. `npo-fast unlearn`, `evaluate` and `report` do the same
from the command line.
"""

import argparse
from pathlib import Path

import npo_fast


class StopInTime(npo_fast.Callback):
    """Prints every step, and ends the run once the forget answers are unlikely enough."""

    def __init__(self, nats):
        self.nats, self.start = nats, None

    def on_step(self, record):
        log_prob = record.log_probs["forget"]  # mean of whole answers, before this step
        self.start = log_prob if self.start is None else self.start
        print(f"step {record.step} of {record.steps}: loss {record.loss:.4f}, {log_prob:.1f} nats")
        if log_prob < self.start - self.nats:
            self.should_stop = f"the forget answers are {self.nats:g} nats less likely than before"


def main(model, forget, retain, output, lr, epochs):
    in_time = StopInTime(nats=60)
    run = npo_fast.unlearn(
        model,
        forget=forget,
        retain=retain,
        method=npo_fast.MethodOptions("NPO+RT", beta=0.1, retain_coefficient=2.0),
        training=npo_fast.TrainSettings(lr=lr, epochs=epochs),
        callbacks=[in_time],
        output=output / "run",
    )
    if in_time.should_stop:
        print(f"stopped: {in_time.should_stop}")
    scores = npo_fast.evaluate(run, forget=forget, retain=retain, output=run.folder / "eval")
    for measure, value in scores.items():
        print(f"{measure}: {value:.4f}")
    print(f"verdict: {scores.verdict}")
    npo_fast.report(run, output=output / "report.html")
    # run.model and run.tokenizer are transformers' own; run.push_to_hub("me/my-model") uploads them


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("model", "forget", "retain"):
        parser.add_argument(name)
    parser.add_argument("output", type=Path)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--epochs", type=int, default=10)
    try:
        main(**vars(parser.parse_args()))
    except npo_fast.UserError as error:  # its message names the value and the cure
        parser.error(str(error))
