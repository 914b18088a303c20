"""A block that was recorded without gradients can be trained on what was recorded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_architectures import ARCHITECTURES, token_batches
from torch import Tensor

from claq_exp.models.blocks import capture_inputs, finish, run_block
from claq_exp.models.stream import WholeModel

BATCHES = [*token_batches(2, size=3), token_batches(1, size=2, seed=1)[0]]


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for own in value:
            yield from tensors(own)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


@pytest.mark.parametrize("recording", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradients_of_a_recorded_block_are_those_of_the_model(name, recording):
    model = ARCHITECTURES[name].build()
    whole = WholeModel(model)
    with recording():
        inputs = capture_inputs(whole, BATCHES)
    for entering in inputs:
        for tensor in tensors([entering.hidden, list(entering.arguments.values())]):
            assert not tensor.is_inference()
            assert not tensor.requires_grad
    first, leaving = whole.blocks[0], []
    hook = first.register_forward_hook(lambda _, __, output: leaving.append(output))
    for number, batch in enumerate(BATCHES):
        model.zero_grad()
        model(batch, use_cache=False)
        output = leaving[-1][0] if isinstance(leaving[-1], tuple) else leaving[-1]
        output.square().sum().backward()
        expected = {n: p.grad.clone() for n, p in first.named_parameters() if p.grad is not None}
        model.zero_grad()
        run_block(first, inputs[0], number).square().sum().backward()
        assert expected
        for path, parameter in first.named_parameters():
            if path in expected:
                torch.testing.assert_close(parameter.grad, expected[path], msg=path)
    hook.remove()


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_a_gradient_reaches_the_head_and_what_entered_it(name):
    whole = WholeModel(ARCHITECTURES[name].build())
    hidden = [torch.randn(*batch.shape, 24, requires_grad=True) for batch in BATCHES]
    for output, entered in zip(finish(whole, BATCHES, hidden), hidden, strict=True):
        output.logits.square().sum().backward()
        assert entered.grad is not None
        assert entered.grad.abs().sum() > 0
    assert whole.model.get_output_embeddings().weight.grad is not None


def test_what_a_model_kept_of_an_inference_is_copied():
    """A mask that a model computes once, inside a measurement, would forbid all training."""
    model = ARCHITECTURES["llama"].build()
    rotary, forward = model.model.rotary_emb, model.model.rotary_emb.forward
    kept: dict[tuple[int, ...], Any] = {}

    def once(hidden: Tensor, position_ids: Tensor) -> Any:
        return kept.setdefault(tuple(position_ids.shape), forward(hidden, position_ids))

    rotary.forward = once
    whole = WholeModel(model)
    with torch.inference_mode():
        model(BATCHES[0], use_cache=False)
    assert all(tensor.is_inference() for tensor in tensors(list(kept.values())))
    with torch.no_grad():
        inputs = capture_inputs(whole, BATCHES[:1])
    assert not any(t.is_inference() for t in tensors(list(inputs[0].arguments.values())))
    run_block(whole.blocks[0], inputs[0], 0).sum().backward()
