"""A small engine of random weights that tests of behaviour share. No PyTorch is needed to import this."""

import importlib.util
import json

import pytest

import qwen_model

END_TOKENS = [290, 301]
if importlib.util.find_spec("torch") is not None:
    import torch

    torch.set_num_threads(1)  # in products this small threads only wait for each other


def save_byte_tokenizer(folder, config=None, special=("<|im_start|>", "<|im_end|>"), added=()):
    """One token for each byte, then special and other added tokens: text of every kind goes through."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {"eos_token": "<|im_end|>"}))
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A Qwen2 checkpoint with a tokenizer and two end tokens."""
    from tests.qwen_model.model_files import hugging_face_model, save_hugging_face

    folder = tmp_path_factory.mktemp("model")
    save_hugging_face(hugging_face_model("Qwen2ForCausalLM", seed=3), folder)
    save_byte_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END_TOKENS}))
    return folder


@pytest.fixture(scope="session")
def engine_dir(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "engine"
    qwen_model.build_engine(
        model_dir, output_dir=folder, dtype="float32", max_batch_size=6, max_input_len=120, max_output_len=40
    )
    return folder


@pytest.fixture(scope="session")
def session(engine_dir):
    return qwen_model.load_engine(engine_dir, device="cpu")
