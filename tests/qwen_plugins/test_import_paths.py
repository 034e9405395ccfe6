"""Import paths of earlier versions lead to the same objects."""

import qwen_plugins.activation
import qwen_plugins.attention
import qwen_plugins.decoder
import qwen_plugins.embedding
import qwen_plugins.sampling


def test_decoder_is_attention_and_activation():
    assert qwen_plugins.decoder.swiglu is qwen_plugins.activation.swiglu
    for name in qwen_plugins.attention.__all__:
        assert getattr(qwen_plugins.decoder, name) is getattr(qwen_plugins.attention, name)
    assert set(qwen_plugins.decoder.__all__) == {*qwen_plugins.attention.__all__, "swiglu"}


def test_sampling_has_gather_rows():
    assert qwen_plugins.sampling.gather_rows is qwen_plugins.embedding.gather_rows
