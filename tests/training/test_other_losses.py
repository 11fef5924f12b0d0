"""Stage 1 with SigLIP's loss, hard negative captions and batches of clusters, as a user runs it."""

import json

import numpy as np
import pytest
import torch

from mmgem import MMGEMModel
from mmgem.data.pairs import BadDataError, PairDataset
from mmgem.training.trainer import MMGEMTrainer
from tests.conftest import Table, make_model, make_picture

from .test_cli import TOWERS, pairs, train  # noqa: F401
from .test_training import CAPTIONS, training_arguments


def with_negatives(**options) -> PairDataset:
    """Each picture with the captions of the next two, and a number of its cluster."""
    rows = [
        {"image": make_picture(i), "caption": caption, "cluster": i // 2, "hard": [CAPTIONS[i - 7], CAPTIONS[i - 6]]}
        for i, caption in enumerate(CAPTIONS)
    ]
    return PairDataset(Table(rows), negative_column="hard", **options)


def test_a_negative_is_drawn_of_those_there_are_and_captions_stay_what_they_were():
    data, plain = with_negatives(), PairDataset(with_negatives().table)
    drawn = set()
    for epoch in range(4):
        data.set_epoch(epoch)
        plain.set_epoch(epoch)
        for i in range(8):
            example = data[i]
            assert example["caption"] == plain[i]["caption"] and "negative" not in plain[i]
            assert example["negative"] in (CAPTIONS[i - 7], CAPTIONS[i - 6])
            drawn.add(example["negative"])
    assert drawn == set(CAPTIONS)
    data.table[0]["hard"] = None
    assert data[0]["negative"] is None


def test_a_caption_that_the_teacher_does_not_know_is_named():
    data = PairDataset(with_negatives().table)
    data.teacher = dict.fromkeys(CAPTIONS[1:], torch.zeros(5))
    with pytest.raises(BadDataError, match=f"the teacher has no vector of its caption '{CAPTIONS[0]}'"):
        data.read(0)


@pytest.mark.parametrize(("packing", "mini_batch_size"), [(False, 0), (True, 3)])
def test_captions_come_to_be_as_alike_as_the_teacher_finds_them(processor, tmp_path, packing, mini_batch_size):
    """Row by row: how far the student's similarities to the other captions are from the teacher's."""
    data, model = PairDataset(with_negatives().table), make_model(processor)
    goals = torch.nn.functional.normalize(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    data.teacher = dict(zip(CAPTIONS, goals))
    options = {"packing": packing, "mini_batch_size": mini_batch_size, "max_steps": 1, "logging_steps": 1}
    options |= {"distillation_weight": 0.5, "caption_loss_weight": 0.25}
    trainer = MMGEMTrainer(model, training_arguments(tmp_path, learning_rate=0.0, **options), processor, data)
    trainer.train()
    logs = trainer.state.log_history[0]
    with torch.no_grad():
        texts = model.get_embedding(**processor(text=CAPTIONS, return_tensors="pt"))
    expected = 0.0
    for i in range(8):
        others = [j for j in range(8) if j != i]
        student, teacher = (torch.softmax(x[others] @ x[i] / 0.05, 0) for x in (texts, goals))
        expected += float((teacher * (teacher / student).log()).sum()) / 8
    assert expected > 0.1 and logs["distillation_loss"] == pytest.approx(expected, rel=1e-4)
    total = logs["contrastive_loss"] + 0.5 * logs["distillation_loss"] + 0.25 * logs["caption_loss"]
    assert logs["loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("mini_batch_size", [0, 3])
def test_loss_is_that_of_all_captions_and_negatives(processor, tmp_path, packing, mini_batch_size):
    """
    Computed from embeddings one by one. A negative that is a caption of a row's image, drawn or not, is none of it:
    half of the negatives are captions of images in the same batch.
    """
    rows = [
        {
            "image": make_picture(i),
            "caption": [caption, f"picture {i}"][: 1 + i % 2],
            "hard": f"picture {2 * (i % 4) + 1}" if i < 6 else None,
        }
        for i, caption in enumerate(CAPTIONS)
    ]
    data, model = PairDataset(Table(rows), negative_column="hard"), make_model(processor)
    options = {"packing": packing, "mini_batch_size": mini_batch_size, "max_steps": 1, "logging_steps": 1}
    trainer = MMGEMTrainer(model, training_arguments(tmp_path, learning_rate=0.0, **options), processor, data)
    trainer.train()
    logged = trainer.state.log_history[0]["contrastive_loss"]
    examples = [data[i] for i in range(8)]

    @torch.no_grad()
    def embed(texts):
        return model.get_embedding(**processor(text=texts, return_tensors="pt"))

    with torch.no_grad():
        images = model.get_embedding(**processor(images=[e["image"] for e in examples], return_tensors="pt"))
    hard = [example["negative"] for example in examples if example["negative"]]
    drawn = embed([example["caption"] for example in examples])
    scores = float(model.logit_scale.scale.detach()) * images @ torch.cat([drawn, embed(hard)]).T
    for i, example in enumerate(examples):
        scores[i, 8:][[text in example["captions"] for text in hard]] = -torch.inf
    assert 3 <= scores.isinf().sum() <= 8
    cross_entropy, right = torch.nn.functional.cross_entropy, torch.arange(8)
    expected = cross_entropy(scores, right) + cross_entropy(scores[:, :8].T, right)
    assert logged == pytest.approx(float(expected), rel=1e-4)


def test_batches_are_clusters_and_a_resumed_run_sees_the_same(processor, tmp_path):
    seen: dict[str, list] = {}

    class Watching(MMGEMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            digests = sorted(inputs["pair_ids"][:, 1].tolist())
            seen.setdefault(self.args.output_dir, []).append(digests)
            return super().compute_loss(model, inputs, *args, **kwargs)

    states = []
    for name, stops in (("whole", [None]), ("halves", [3, None])):
        for stop in stops:
            options = {"max_steps": stop or 6, "save_strategy": "steps", "save_steps": 3, "batch_sampler": "clustered"}
            args = training_arguments(tmp_path / name, per_device_train_batch_size=2, **options)
            args.lr_scheduler_type = "constant"
            model = make_model(processor)
            trainer = Watching(model, args, processor, with_negatives())
            trainer.train(resume_from_checkpoint=len(stops) > 1 and stop is None)
        states.append(model.state_dict())
    whole, halves = seen.values()
    assert whole == halves and all(torch.equal(states[0][name], value) for name, value in states[1].items())
    data = with_negatives()
    clusters = [sorted([data.image_id(2 * i), data.image_id(2 * i + 1)]) for i in range(4)]
    assert all(batch in clusters for batch in whole)
    assert len({tuple(batch) for batch in whole[:4]}) == 4


def test_from_the_command_line(train, pairs, tmp_path):  # noqa: F811
    """A new model with SigLIP's loss, which goes on with it, and then with InfoNCE."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows = [{**row, "negative_caption": rows[i - 1]["captions"], "cluster": i // 4} for i, row in enumerate(rows)]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    data = ["--train_file", pairs, "--validation_file", pairs, "--caption_column", "captions", "--report_to", "none"]
    data += ["--negative_caption_column", "negative_caption", "--max_steps", 2, "--caption_samples", 0]
    data += ["--per_device_train_batch_size", 4, "--use_cpu", "true", "--batch_sampler", "clustered"]
    run = [*TOWERS, "--output_dir", "first", "--contrastive_loss", "sigmoid", "--save_strategy", "steps"]
    train(*data, *run)
    others = [word for word in data if "negative_caption" not in str(word)]
    with pytest.raises(SystemExit, match="negative_caption_column 'negative_caption', not None"):
        train(*others, *run, "--resume_from_checkpoint", "true")
    first = MMGEMModel.from_pretrained(tmp_path / "first")
    assert first.config.logit_bias_init_value == -10 and first.logit_scale.bias.item() != -10
    assert first.logit_scale.scale.item() == pytest.approx(10, rel=0.1)
    record = json.loads((tmp_path / "first" / "training.json").read_text())["settings"]
    assert record["contrastive_loss"] == "sigmoid" and record["batch_sampler"] == "clustered"
    train(*data, "--init_from", "first", "--output_dir", "second", "--learning_rate", "1e-9")
    second = MMGEMModel.from_pretrained(tmp_path / "second")
    np.testing.assert_allclose(second.logit_scale.bias.item(), first.logit_scale.bias.item(), atol=1e-6)
    train(*data, "--init_from", "first", "--output_dir", "third", "--contrastive_loss", "softmax")
    third = MMGEMModel.from_pretrained(tmp_path / "third")
    assert third.logit_scale.bias is None and third.config.logit_bias_init_value is None
    train(*data, "--init_from", "third", "--output_dir", "fourth", "--contrastive_loss", "sigmoid")
    assert MMGEMModel.from_pretrained(tmp_path / "fourth").logit_scale.bias is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_sampler", "clustered"], "needs a column 'cluster' of numbers"),
        (["--negative_caption_column", "nothing"], "no column 'nothing'"),
        (["--negative_caption_column", "captions", "--objective", "caption"], "is for L_Emb of stage 1"),
        (["--teacher", "a", "--objective", "caption"], "teacher is for --stage text-distillation, and for L_Emb"),
        (["--teacher", "a", "--train_shards", "a.tar"], "captions before the run"),
        (["--distillation_weight", "2"], "distillation_weight is that of a teacher's loss. Give --teacher"),
        (["--feature_cache_dir", "a"], "pass --cache_features true too, or --teacher"),
        (["--temperature", "0.02"], "temperature is learned in stage 1"),
        (["--distillation_prompt", "In a word:"], "distillation_prompt is for --stage text-distillation"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(train, pairs, options, message):  # noqa: F811
    data = ["--caption_column", "captions", "--report_to", "none", "--max_steps", 1]
    data += ["--train_file", pairs] if "--train_shards" not in options else []
    with pytest.raises(SystemExit) as stopped:
        train(*data, *TOWERS, "--per_device_train_batch_size", 4, "--use_cpu", "true", *options)
    assert message in str(stopped.value)
