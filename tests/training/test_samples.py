"""Sample ids of a run that was cut and resumed."""

import json

from megatron_opt.training.samples import KEY, Numbered, consumed


def test_what_follows_a_resumed_checkpoint_is_void(tmp_path):
    lines = [(1.0, 1, [0, 1]), (2.0, 2, [4, 5]), (3.0, 3, [8, 9]), (6.0, 3, [8, 9, 10, 11])]
    (tmp_path / "samples-0.jsonl").write_text(
        "".join(json.dumps({"time": t, "iteration": n, "ids": ids}) + "\n" for t, n, ids in lines) + '{"time": 7, "iter'
    )
    (tmp_path / "samples-1.jsonl").write_text(json.dumps({"time": 1.5, "iteration": 1, "ids": [2, 3]}) + "\n")
    assert consumed(tmp_path, [(5.0, 2)]) == {1: [0, 1, 2, 3], 2: [4, 5], 3: [8, 9, 10, 11]}


def test_numbered_is_the_dataset_with_ids():
    class Data(list):
        split = "train"

    data = Numbered(Data([{"tokens": 7}]))
    assert len(data) == 1 and data[0] == {"tokens": 7, KEY: 0} and data.split == "train"
