"""Requests in a row: python examples/ten_requests.py MODEL REQUESTS RETAIN.jsonl OUTPUT

REQUESTS is a folder with a .jsonl file of questions and answers for each request, taken in order:
1.jsonl, 2.jsonl, …, 10.jsonl. Each starts from the model that the last one left. RETAIN is what to
keep, and holds none of their records. OUTPUT is a new folder for the runs and report.html.
"""

import argparse
from itertools import chain
from pathlib import Path

import numpy as np

import npo_fast
from npo_fast.data import load_records
from npo_fast.metrics import FORGET, RETAIN, probability


def main(model, requests, retain, output, lr, epochs):
    files = sorted(requests.glob("*.jsonl"), key=lambda file: (len(file.stem), file.stem))
    if not files:
        raise npo_fast.UserError(f"{requests} holds no .jsonl file: put one there for each request")
    records = [load_records(file) for file in files]
    ends = np.cumsum([len(each) for each in records])[:-1]
    runs = []
    print("Mean probability of the answers of each request, in brackets once it was made")
    for number, file in enumerate(files, 1):
        run = npo_fast.unlearn(
            runs[-1] if runs else model,
            forget=file,
            retain=retain,
            method=npo_fast.MethodOptions("NPO+RT", reference="first"),
            training=npo_fast.TrainSettings(lr=lr, epochs=epochs),
            output=output / file.stem,
        )
        runs.append(run)
        logs = npo_fast.evaluate(
            run, forget=[*chain(*records)], retain=retain, output=run.folder / "eval"
        ).logs
        means = [values.mean() for values in np.split(probability(logs[FORGET]), ends)]
        told = [f"[{p:.3f}]" if i < number else f" {p:.3f} " for i, p in enumerate(means)]
        kept = probability(logs[RETAIN]).mean()
        print(f"after {file.stem}:", *told, f" kept: {kept:.3f}  {run.verdict.outcome}", flush=True)
    npo_fast.report(runs, output=output / "report.html")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("requests", type=Path)
    parser.add_argument("retain")
    parser.add_argument("output", type=Path)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--epochs", type=int, default=10)
    try:
        main(**vars(parser.parse_args()))
    except npo_fast.UserError as error:  # its message names the value and the cure
        parser.error(str(error))
