"""A stand-in for the training job: obeys the same contract, takes its losses from a law with noise.

Saves a checkpoint every iteration, resumes from it, and writes each iteration it trains to `ledger`.
"""

import hashlib
import json
import math
import os
import signal
import sys
import time

OPTIMUM = {"adamw": 0.008, "muon": 0.016, "soap": 0.008}
GAIN = {"adamw": 1.0, "muon": 1.3, "soap": 1.25}
BETA1 = {"adamw": 0.9, "muon": 0.95, "soap": 0.95}


def law(optimizer, parameters, tokens, lr, beta1, weight_decay, seed, noise, drift=1.0):
    """Final loss of a run, or inf above the cliff at four times the best learning rate."""
    best = OPTIMUM[optimizer] * (1e6 / parameters) ** 0.1 * drift
    if lr > 4.5 * best:
        return math.inf
    loss = 1.8 + 18.0 / parameters**0.25 + 30.0 / (GAIN[optimizer] * tokens) ** 0.3
    loss += 0.03 * math.log2(lr / best) ** 2 + 2.0 * (beta1 - BETA1[optimizer]) ** 2
    loss += 0.5 * (weight_decay - 0.1) ** 2
    text = repr((optimizer, parameters, tokens, lr, beta1, weight_decay, seed))
    bits = hashlib.sha256(text.encode()).digest()
    u, v = ((int.from_bytes(bits[i : i + 6], "big") + 1) / 2**48 for i in (0, 6))
    return loss + noise * math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v)


def flags_of(words):
    flags, name = {}, None
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            flags[name] = True
        else:
            flags[name] = word
    return flags


def drifted(flags):
    """How far the best rate of a width lies below that of width 32: as (width / 32)^FAKE_DRIFT, with µP not at all."""
    return 1.0 if "use-mup" in flags else (int(flags["hidden-size"]) / 32) ** float(os.environ["FAKE_DRIFT"])


def replace(path, data):
    with open(path + ".tmp", "w") as file:
        file.write(json.dumps(data))
    os.replace(path + ".tmp", path)


def main():
    flags = flags_of(sys.argv[1:])
    folder, optimizer = flags["output-dir"], flags["optimizer"]
    if os.environ.get("FAKE_FAIL") and float(flags["lr"]) == float(os.environ["FAKE_FAIL"]):
        print("RuntimeError: no such luck")
        return int(os.environ.get("FAKE_CODE", "1"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    layers, hidden, ffn = (int(flags[k]) for k in ("num-layers", "hidden-size", "ffn-hidden-size"))
    parameters = layers * (3 * hidden * ffn + 4 * hidden**2)
    iterations, per_step = (
        int(flags["train-iters"]),
        int(flags["global-batch-size"]) * int(flags["seq-length"]),
    )
    seed, noise = int(flags["seed"]), float(os.environ.get("FAKE_NOISE", "0.001"))
    final = law(
        optimizer,
        parameters,
        iterations * per_step,
        float(flags["lr"]),
        float(flags.get("adam-beta1", 0.9)),
        float(flags.get("weight-decay", 0.1)),
        seed,
        noise,
        # without µP the best rate may move with the width; as here it does not move with the size then
        1.0 if "FAKE_DRIFT" not in os.environ else (parameters / 1e6) ** 0.1 / drifted(flags),
    )
    os.makedirs(flags["save"], exist_ok=True)
    checkpoint = os.path.join(flags["save"], "latest.json")
    done = 0
    if os.path.exists(checkpoint):
        with open(checkpoint) as file:
            done = json.load(file)["iteration"]
    started = time.time()
    with (
        open(os.path.join(folder, "metrics.jsonl"), "a") as metrics,
        open(os.path.join(folder, "ledger"), "a") as ledger,
    ):
        steps = min(iterations, int(os.environ.get("FAKE_STEPS", "20")))
        for step in range(done + 1, steps + 1):
            iteration = step * iterations // steps
            time.sleep(float(os.environ.get("FAKE_SLEEP", "0")))
            loss = (final if math.isfinite(final) else 8.0) + 2.0 * (1 - iteration / iterations)
            kinds = ("train", "eval") if step % 4 == 0 or step == steps else ("train",)
            for kind in kinds:
                point = {"kind": kind, "iteration": iteration, "tokens": iteration * per_step, "loss": loss}
                point |= (
                    {"split": "valid"}
                    if kind == "eval"
                    else {
                        "lr": float(flags["lr"]),
                        "grad_norm": 1.0,
                        "step_time": 0.01,
                        "tokens_per_s": per_step / 0.01,
                        "weight_norm": {"qkv": 10.0},
                        "angular_update": {"qkv": float(flags["lr"]) / 10},
                    }
                )
                metrics.write(json.dumps(point) + "\n")
            metrics.flush()
            ledger.write(f"{iteration}\n")
            ledger.flush()
            replace(checkpoint, {"iteration": step})
            if os.environ.get("FAKE_CRASH_EVERY") and step % int(os.environ["FAKE_CRASH_EVERY"]) == 0 and step < steps:
                return 1
    diverged = not math.isfinite(final)
    wall = time.time() - started
    replace(
        os.path.join(folder, "results.json"),
        {
            "status": "diverged" if diverged else "completed",
            "diverged": diverged,
            "optimizer": optimizer,
            "seed": seed,
            "params_non_embedding": parameters,
            "tokens": iterations * per_step,
            "iterations": iterations,
            "final_train_loss": None if diverged else final,
            "final_valid_loss": None if diverged else final,
            "wall_time_s": wall + 1.0,
            "train_time_s": wall + 0.5,
            "tokens_per_s": per_step / 0.01,
            "world_size": 1,
            "step_time_s": {
                "total": 0.01,
                "forward_backward": 0.008,
                "optimizer": 0.002,
                "communication": 0.0,
            },
            "peak_memory_bytes": 12345678,
            "tokenizer": {"model": "t", "vocab_size": 64, "sha256": "0" * 64},
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
