"""Models and tokenizers of transformers, straight from a store and back to a directory; offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import bits

import tallstore
from tallstore.errors import OptionError, StoreExistsError, UnknownTaskError
from tallstore.integrations.transformers import from_store, save_pretrained, tokenizer_from_store
from tallstore.serving import TaskSwitcher

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 100,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever would ask the hub fails."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def bert(classes: int = 3) -> Any:
    config = transformers.BertConfig(**SMALL, num_labels=classes)
    return transformers.BertForSequenceClassification(config).eval()


def llama() -> Any:
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(("[UNK]", "one", "two", "three"))}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def make(folder: Path, model: Any, *, exact: bool = True) -> Path:
    """A store of a model and of a fine-tune of it, which `model` is afterwards."""
    model.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(folder / "tuned")
    tokenizer().save_pretrained(folder / "tuned")
    tallstore.pack(folder / "zoo.tall", folder / "base", {"t": folder / "tuned"}, exact=exact)
    return folder / "zoo.tall"


def same(a: Any, b: Any) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(bits(x[name]) == bits(y[name]) for name in x)


@pytest.mark.parametrize("make_model", [bert, llama])
def test_a_model_and_its_tokenizer(tmp_path: Path, make_model: Any) -> None:
    tuned = make_model()
    store = make(tmp_path, tuned)
    model, words = from_store(store, "t")
    assert type(model) is type(tuned) and not model.training and same(model, tuned)
    assert model.dtype == tuned.dtype and words("two three")["input_ids"] == [2, 3]
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, tuned(ids).logits)
    with tallstore.open(store) as opened:
        base, _ = from_store(opened, model_class=transformers.AutoModel, dtype=torch.float32)
        assert type(base).__name__ in ("BertModel", "LlamaModel") and base.dtype == torch.float32
    if make_model is llama:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.generation_config.to_dict() == tuned.generation_config.to_dict()


def test_masks_alone(tmp_path: Path) -> None:
    store = make(tmp_path, bert(), exact=False)
    model, _ = from_store(store, "t")
    loaded = tallstore.load(store, task="t")
    assert all(bits(t) == bits(loaded[name]) for name, t in model.state_dict().items())


def test_back_to_a_directory(tmp_path: Path) -> None:
    tuned = bert()
    store = make(tmp_path, tuned)
    out = tmp_path / "out"
    files = {path.relative_to(out).as_posix() for path in save_pretrained(store, "t", out)}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    again = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert same(again, tuned)
    with pytest.raises(StoreExistsError):
        save_pretrained(store, "t", out)
    save_pretrained(store, "t", tmp_path / "shards", max_shard_size=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert same(type(tuned).from_pretrained(tmp_path / "shards"), tuned)


def test_it_can_be_switched(tmp_path: Path) -> None:
    tuned = bert()
    store = make(tmp_path, tuned)
    more = bert(5)
    more.save_pretrained(tmp_path / "five")
    tallstore.add(store, {"five": tmp_path / "five"})
    model, _ = from_store(store, "t")
    with TaskSwitcher(model, store) as switcher:
        assert set(switcher.switch("five").replaced) == {"classifier.weight", "classifier.bias"}
        assert same(model, more) and model.classifier.out_features == 5
        ids = torch.tensor([[1, 2, 3]])
        assert torch.equal(model(ids).logits, more(ids).logits)
        switcher.switch("t")
        assert same(model, tuned)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights.tall"
    tallstore.save({"w": torch.ones(3)}, weights)
    for use in (
        lambda: from_store(weights),
        lambda: save_pretrained(weights, None, tmp_path / "out"),
    ):
        with pytest.raises(OptionError, match=r"it has no config\.json; pack model directories"):
            use()
    assert tokenizer_from_store(weights) is None
    store = make(tmp_path, bert())
    with pytest.raises(UnknownTaskError):
        from_store(store, "z")
    with pytest.raises(OptionError, match="model_class=3: a class of transformers is needed"):
        from_store(store, "t", model_class=3)
    with pytest.raises(OptionError, match="model_class=AutoModelForCTC: Unrecognized"):
        from_store(store, "t", model_class=transformers.AutoModelForCTC)
    assert tokenizer_from_store(store, "t")("one")["input_ids"] == [1]
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(OptionError, match=r"pip install 'tallstore\[transformers\]'"):
        from_store(store, "t")


def test_weights_added_without_files_take_the_bases(tmp_path: Path) -> None:
    tuned = bert()
    store = make(tmp_path, tuned)
    tallstore.add(store, {"bare": tuned.state_dict()})
    model, words = from_store(store, "bare")
    assert same(model, tuned) and words is not None
