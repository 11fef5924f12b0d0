"""The stage text-distillation as a user runs it: texts, teacher, what is learned and saved, resume, faults."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from scipy.stats import spearmanr
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmgem.data import texts
from mmgem.data.arguments import DataArguments
from mmgem.data.pairs import as_captions
from mmgem.data.texts import TeacherVectors, as_tensors, load_teacher, load_texts, with_teacher
from mmgem.data.tokenizer import train_tokenizer
from mmgem.processing import to_mmgem_tokenizer
from mmgem.training.arguments import MMGEMTrainingArguments
from mmgem.training.text_trainer import TextCollator, TextDistillationTrainer, embeds_of_last_tokens, spearman
from tests.conftest import CORPUS, make_language_model

from .test_cli import TOWERS, pairs, train  # noqa: F401


TEXTS = [*dict.fromkeys(CORPUS), "a boat", "an old man reads", "three birds on a wire", "green apples in a bowl"]
PROMPT = "Summary above sentence in one word:"


def data(seed: int = 0) -> Dataset:
    """Each text with a vector of a teacher that draws them."""
    goals = torch.randn(len(TEXTS), 12, generator=torch.Generator().manual_seed(seed))
    goals = torch.nn.functional.normalize(goals, dim=-1)
    return as_tensors(Dataset.from_dict({"text": TEXTS, "teacher_embeds": goals.tolist()}))


def arguments(tmp_path, **options) -> MMGEMTrainingArguments:
    defaults = {
        "output_dir": str(tmp_path),
        "stage": "text-distillation",
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return MMGEMTrainingArguments(**{**defaults, **options})


@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_a_text_is_embedded_at_the_last_token_of_the_prompt_behind_it(base_tokenizer, prompt):
    """Whatever stands in the same batch: row by row without padding, with the tokens of `text prompt`."""
    model = make_language_model(base_tokenizer).base_model
    collator = TextCollator(base_tokenizer, prompt, 60, 3)
    found = {}
    for part in collator.parts(TEXTS):
        order = part.pop("order").tolist()
        with torch.no_grad():
            found.update(zip(order, embeds_of_last_tokens(model, part)))
    for i, text in enumerate(TEXTS):
        ids = base_tokenizer(f"{text} {prompt}".strip(), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            state = model(input_ids=ids).last_hidden_state[0, -1]
        torch.testing.assert_close(found[i], state / state.norm(), atol=1e-5, rtol=0)


def test_the_prompt_stands_behind_a_text_in_tokenizers_that_start_every_text_with_a_space():
    """As that of Llama 2 does."""
    tokenizer = train_tokenizer(CORPUS, 320)
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(spaces)
    (part,) = TextCollator(tokenizer, PROMPT, 60).parts(["a dog"])
    assert part["input_ids"][0].tolist() == tokenizer(f"a dog {PROMPT}")["input_ids"]


@pytest.mark.parametrize("start_token", [None, "<|endoftext|>"], ids=["its BOS", "the start of a document"])
def test_a_text_starts_as_in_stage_1(start_token):
    """A tokenizer that writes no BOS, as that of SmolLM2, gives the tokens that MM-GEM's writes before [EMB]."""
    tokenizer = train_tokenizer(CORPUS, 320)
    if start_token:
        tokenizer.add_special_tokens({"additional_special_tokens": [start_token]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    expected = [ids[:-1] for ids in to_mmgem_tokenizer(copy.deepcopy(tokenizer))(TEXTS)["input_ids"]]
    rows = {}
    for part in TextCollator(tokenizer, "", 60).parts(TEXTS):
        ids = (row[kept.bool()].tolist() for row, kept in zip(part["input_ids"], part["attention_mask"]))
        rows.update(zip(part["order"].tolist(), ids))
    assert [rows[i] for i in range(len(TEXTS))] == expected
    assert {ids[0] for ids in expected} == {tokenizer.convert_tokens_to_ids(start_token or tokenizer.bos_token)}
    (part,) = TextCollator(tokenizer, PROMPT, 40).parts(["a dog on a beach " * 20])
    assert part["input_ids"].shape == (1, 40)


def test_a_long_text_is_cut_and_the_prompt_stays(base_tokenizer):
    collator = TextCollator(base_tokenizer, PROMPT, 40)
    (part,) = collator.parts(["a dog on a beach " * 20])
    assert part["input_ids"].shape == (1, 40)
    assert part["input_ids"][0, -len(collator.prompt_ids) :].tolist() == collator.prompt_ids
    with pytest.raises(ValueError, match="max_length 20 leaves no room for texts"):
        TextCollator(base_tokenizer, PROMPT, 20)


def test_spearman_is_that_of_scipy():
    one, other = (torch.nn.functional.normalize(torch.randn(9, d), dim=-1) for d in (4, 7))
    upper = np.triu_indices(9, 1)
    expected = spearmanr(*((x @ x.T).numpy()[upper] for x in (one, other))).statistic
    assert spearman(one, other) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0)], ids=["full", "lora"])
def test_learns_what_the_teacher_finds_alike_and_saves_a_language_model(base_tokenizer, tmp_path, peft_config):
    model = make_language_model(base_tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = arguments(tmp_path, max_steps=60, learning_rate=1e-2 if peft_config else 3e-3)
    trainer = TextDistillationTrainer(model, args, base_tokenizer, data(), data(), peft_config=peft_config)
    before_training = trainer.evaluate()["eval_teacher_spearman"]
    trainer.train()
    logs = [log["distillation_loss"] for log in trainer.state.log_history if "distillation_loss" in log]
    assert logs[-1] < 0.2 * logs[0]
    found = trainer.evaluate()["eval_teacher_spearman"]
    assert found > before_training + 0.5
    embeds = trainer.embed(TEXTS)
    trainer.merge_lora()
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.state_dict().keys() == before.keys()
    assert torch.equal(saved.lm_head.weight, before["lm_head.weight"])
    moved = {name for name, value in saved.state_dict().items() if not torch.equal(value, before[name])}
    assert any("mlp" in name for name in moved) and ("model.embed_tokens.weight" in moved) == (peft_config is None)
    collator = TextCollator(AutoTokenizer.from_pretrained(tmp_path), PROMPT, 50)
    with torch.no_grad():
        for part in collator.parts(TEXTS):
            torch.testing.assert_close(
                embeds_of_last_tokens(saved.base_model, part), embeds[part["order"]], atol=1e-5, rtol=0
            )


def test_resumed_equals_uninterrupted(base_tokenizer, tmp_path):
    states = []
    for name, stops in (("whole", [None]), ("halves", [2, None])):
        for stop in stops:
            model = make_language_model(base_tokenizer)
            args = arguments(
                tmp_path / name,
                per_device_train_batch_size=3,
                max_steps=stop or 4,
                save_strategy="steps",
                save_steps=2,
            )
            trainer = TextDistillationTrainer(model, args, base_tokenizer, data())
            trainer.train(resume_from_checkpoint=len(stops) > 1 and stop is None)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


@pytest.fixture(scope="session")
def teacher(base_tokenizer, tmp_path_factory):
    """A tiny model of sentence-transformers: the mean of the states of a language model."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    folder = tmp_path_factory.mktemp("teacher")
    make_language_model(base_tokenizer, seed=7).base_model.save_pretrained(folder / "lm")
    base_tokenizer.save_pretrained(folder / "lm")
    SentenceTransformer(modules=[Transformer(str(folder / "lm")), Pooling(32)]).save(str(folder / "st"))
    return folder / "st"


def test_the_teacher_embeds_once(teacher, tmp_path, monkeypatch):
    table, model = Dataset.from_dict({"text": TEXTS}), load_teacher(str(teacher))
    (first,) = with_teacher([table], model, str(tmp_path))
    assert torch.stack(list(first["teacher_embeds"])).norm(dim=-1) == pytest.approx(torch.ones(len(TEXTS)))

    def ask(*args, **options):
        raise RuntimeError("the teacher is asked")

    monkeypatch.setattr(model, "encode", ask)
    (again,) = with_teacher([table], model, str(tmp_path))
    assert torch.equal(again[3]["teacher_embeds"], first[3]["teacher_embeds"])
    with pytest.raises(RuntimeError, match="the teacher is asked"):  # nothing is known of other texts
        with_teacher([table.select([0, 1])], model, str(tmp_path))
    with torch.no_grad():  # nor of another teacher in the same folder
        next(model.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="the teacher is asked"):
        with_teacher([table], model, str(tmp_path))


def arguments_of(tmp_path, rows, **options) -> DataArguments:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return DataArguments(train_file=str(path), **options)


def test_every_text_of_the_columns_once(tmp_path):
    rows = [{"anchor": " a dog ", "others": ["snow", "", "a dog"]}, {"anchor": None, "others": ["a cat", "snow"]}]
    found = load_texts(arguments_of(tmp_path, rows, text_columns=["anchor", "others"]), 0)
    assert found[0]["text"] == ["a dog", "snow", "a cat"] and found[1] is None
    found = load_texts(arguments_of(tmp_path, rows, text_columns=["others"], max_train_samples=2), 0)[0]
    assert found["text"] == ["snow", "a dog"]
    (tmp_path / "lines.txt").write_text("a dog\n\nsnow\na dog\n")
    assert load_texts(DataArguments(train_file=str(tmp_path / "lines.txt"), text_columns=["text"]), 0)[0]["text"] == [
        "a dog",
        "snow",
    ]


def test_vectors_of_a_column_become_unit_vectors(tmp_path):
    rows = [{"caption": "a dog", "v": [3.0, 4.0]}, {"caption": "snow", "v": [0.0, 2.0]}]
    found = load_texts(arguments_of(tmp_path, rows, teacher_column="v"), 0)[0]
    torch.testing.assert_close(torch.stack(list(found["teacher_embeds"])), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"t": "a"}], {}, "no column 'caption'; its columns are t. Set --text_columns"),
        ([{"caption": 3}], {}, "Row 0: captions must be text, got 3"),
        ([{"caption": ""}], {}, "no text in caption"),
        ([{"caption": "a"}], {"teacher_column": "v"}, "no column 'v'"),
        ([{"caption": ["a", "b"], "v": [1.0]}], {"teacher_column": "v"}, "2 texts for one vector of 'v'"),
        ([{"caption": "a", "v": [1.0]}, {"caption": "b", "v": [1.0, 2.0]}], {"teacher_column": "v"}, "all as long"),
        ([{"caption": "a", "v": "x"}], {"teacher_column": "v"}, "vector of finite numbers"),
    ],
)
def test_faulty_tables_are_refused(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        load_texts(arguments_of(tmp_path, rows, **options), 0)


def test_from_the_command_line(train, base_tokenizer, teacher, tmp_path, capsys):  # noqa: F811
    """Then stage 1 takes what it saved for a language model."""
    make_language_model(base_tokenizer).save_pretrained(tmp_path / "lm")
    base_tokenizer.save_pretrained(tmp_path / "lm")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    options = ["--stage", "text-distillation", "--text_model_name_or_path", tmp_path / "lm", "--report_to", "none"]
    options += [
        "--train_file",
        "texts.txt",
        "--validation_file",
        "texts.txt",
        "--text_columns",
        "text",
        "--output_dir",
    ]
    options += ["out", "--teacher", teacher, "--max_steps", 3, "--per_device_train_batch_size", 4, "--use_cpu", "true"]
    train(*options, "--lora_rank", 2, "--mini_batch_size", 3)
    printed = capsys.readouterr().out
    assert "M trained; 8 texts" in printed and "untrained_teacher_spearman" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["metrics"].keys() == {"untrained_teacher_spearman", "distilled_teacher_spearman"}
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["settings"]["lora_rank"] == 2 and record["settings"]["temperature"] == 0.05
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == len(base_tokenizer)


def test_stage_1_learns_from_a_teacher_of_captions(train, pairs, teacher, tmp_path):  # noqa: F811
    """Which embeds each distinct caption once, for this run and the next."""
    data = ["--train_file", pairs, "--caption_column", "captions", "--report_to", "none", "--use_cpu", "true"]
    data += [*TOWERS, "--teacher", teacher, "--feature_cache_dir", "vectors", "--per_device_train_batch_size", 4]
    train(*data, "--max_steps", 2, "--output_dir", "one", "--logging_steps", 1, "--distillation_weight", 2)
    (kept,) = (tmp_path / "vectors").iterdir()
    written = kept.stat().st_mtime_ns
    train(*data, "--max_steps", 1, "--output_dir", "other", "--freeze", "vision_model", "--cache_features", "true")
    assert [file.stat().st_mtime_ns for file in (tmp_path / "vectors").glob("teacher-*")] == [written]
    record = json.loads((tmp_path / "one" / "training.json").read_text())["settings"]
    assert record["teacher"] == "st" and record["distillation_weight"] == 2
    embedded = Dataset.from_file(str(kept))
    vectors = TeacherVectors(embedded)
    captions = {
        caption for line in pairs.read_text().splitlines() for caption in as_captions(json.loads(line)["captions"])
    }
    assert set(vectors) == captions and len(embedded) == len(captions)
    for caption in captions:
        expected = load_teacher(str(teacher)).encode(caption, normalize_embeddings=True)
        np.testing.assert_allclose(vectors[caption], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--teacher": None}, "exactly one of teacher, teacher_column"),
        ({"--text_model_name_or_path": None}, "give --text_model_name_or_path"),
        ({"--image_size": 32}, "image_size has no effect in --stage text-distillation"),
        ({"--hardest_negatives": 8}, "hardest_negatives is for other stages"),
        ({"--caption_loss_weight": 2}, "caption_loss_weight is for other stages"),
        ({"--temperature": 0}, "temperature must be above 0, got 0"),
        ({"--teacher": "no/such/folder"}, "--teacher no/such/folder is no model of sentence-transformers"),
        ({"--max_length": 9}, "max_length 9 leaves no room"),
        ({"--per_device_train_batch_size": 64}, "8 distinct texts do not fill one batch of 64"),
        ({"--dataset_name": "scenes", "--train_file": None}, "scenes are drawn"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(train, base_tokenizer, teacher, tmp_path, options, message):  # noqa: F811
    make_language_model(base_tokenizer).save_pretrained(tmp_path / "lm")
    base_tokenizer.save_pretrained(tmp_path / "lm")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    given = {"--train_file": "texts.txt", "--text_columns": "text", "--teacher": teacher, "--output_dir": "out"}
    given |= {"--text_model_name_or_path": tmp_path / "lm", "--report_to": "none", "--max_steps": 1, **options}
    words = [word for name, value in given.items() if value is not None for word in (name, value)]
    with pytest.raises(SystemExit) as stopped:
        train("--stage", "text-distillation", "--use_cpu", "true", "--per_device_train_batch_size", 4, *words)
    assert message in str(stopped.value)


def test_the_teacher_needs_its_library(monkeypatch):
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'mmgem\[sentence-transformers\]'"):
        load_teacher("a")
