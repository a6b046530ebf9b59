"""Your own method: python examples/custom_method.py MODEL FORGET.jsonl RETAIN.jsonl OUTPUT

A method is a tuple of terms, and `npo_fast.unlearn` runs any: each is a loss, the data that it is
taken over, how it is averaged, and its coefficient. This one has NPO on the forget data and, on the
retain data, both the loss of +RT and the KL of +KL.
"""

import argparse

import npo_fast
from npo_fast.losses import KL, NLL, NPO
from npo_fast.methods import Term


def method(beta=0.1, retain=1.0, kl=0.5):
    """The terms; in place of NPO a loss of your own fits, such as Hinge of custom_loss.py."""
    return (
        Term("NPO", source="forget", loss=NPO(beta), reduction="mean"),
        Term("retain NLL", "retain", NLL(), "token_mean", coefficient=retain),
        Term("retain KL", "retain", KL(), "token_mean", coefficient=kl),
    )


def main(model, forget, retain, output, lr, epochs):
    run = npo_fast.unlearn(
        model,
        forget=forget,
        retain=retain,
        method=method(),
        training=npo_fast.TrainSettings(lr=lr, epochs=epochs),
        output=output,
    )
    for record in run.records:
        terms = ", ".join(f"{name} {value:.4f}" for name, value in record["terms"].items())
        print(f"step {record['step']}: loss {record['loss']:.4f} = {terms}")
    print(f"verdict: {run.verdict}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("model", "forget", "retain", "output"):
        parser.add_argument(name)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--epochs", type=int, default=10)
    try:
        main(**vars(parser.parse_args()))
    except npo_fast.UserError as error:  # its message names the value and the cure
        parser.error(str(error))
