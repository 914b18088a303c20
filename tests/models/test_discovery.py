"""Blocks and groups are found by looking, and blocks run one by one as they do in the model."""

from __future__ import annotations

import pytest
import torch
from tiny_architectures import ARCHITECTURES, token_batches
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from claq_exp.errors import ConfigError, SourceError
from claq_exp.models.blocks import BlockInputs, capture_inputs, feed, run_block
from claq_exp.models.discover import (
    LinearGroup,
    find_blocks,
    find_waves,
    linear_weight,
    linears_of,
)
from claq_exp.models.skeleton import dense_parameter_count, dense_parameter_shapes, tied_names
from claq_exp.models.stream import WholeModel


def entering(block: nn.Module, inputs: BlockInputs, batch: int, module: nn.Module) -> torch.Tensor:
    """What enters a module of a block."""
    seen: list[torch.Tensor] = []
    feed(block, inputs, batch, {module: seen.append})
    return torch.cat(seen)


def groups_of(block: nn.Module, inputs: BlockInputs) -> list[LinearGroup]:
    return [group for wave in find_waves(block, inputs) for group in wave]


every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@every_architecture
def test_blocks_are_the_list_that_holds_most_linear_weights(name):
    model = ARCHITECTURES[name].build()
    path, blocks = find_blocks(model)
    assert path == ARCHITECTURES[name].blocks
    assert blocks is model.get_submodule(path)
    assert len(blocks) == ARCHITECTURES[name].depth


@every_architecture
def test_linears_with_the_same_input_form_groups_in_execution_order(name):
    model = ARCHITECTURES[name].build()
    _, blocks = find_blocks(model)
    inputs = capture_inputs(WholeModel(model), token_batches(1))
    groups = groups_of(blocks[0], inputs[0])
    assert [group.names for group in groups] == ARCHITECTURES[name].groups
    assert {name for group in groups for name in group.names} == set(linears_of(blocks[0]))


def hidden_states_of(model: nn.Module, blocks: nn.ModuleList, tokens: torch.Tensor):
    """What each block puts out in an ordinary forward pass."""
    outputs = []
    hooks = [
        block.register_forward_hook(
            lambda _, __, output: outputs.append(output[0] if type(output) is tuple else output)
        )
        for block in blocks
    ]
    with torch.inference_mode():
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return outputs


@every_architecture
def test_running_block_by_block_gives_the_models_own_hidden_states(name):
    model = ARCHITECTURES[name].build()
    _, blocks = find_blocks(model)
    batches = token_batches(3)
    inputs = capture_inputs(WholeModel(model), batches)
    expected = [hidden_states_of(model, blocks, batch) for batch in batches]
    for index, block in enumerate(blocks):
        assert len(inputs[index].hidden) == 3
        outputs = [run_block(block, inputs[index], batch) for batch in range(3)]
        for batch, output in enumerate(outputs):
            torch.testing.assert_close(output, expected[batch][index], rtol=1e-5, atol=1e-6)
        if index + 1 < len(blocks):
            assert inputs[index + 1].hidden == []
            inputs[index + 1].hidden = outputs


@every_architecture
def test_a_module_is_fed_what_enters_it_in_the_model(name):
    model = ARCHITECTURES[name].build()
    _, blocks = find_blocks(model)
    batches = token_batches(2)
    inputs = capture_inputs(WholeModel(model), batches)
    for linear in linears_of(blocks[0]).values():
        seen = []
        hook = linear.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.inference_mode():
            model(batches[1], use_cache=False)
        hook.remove()
        found = entering(blocks[0], inputs[0], 1, linear)
        torch.testing.assert_close(found, seen[0], rtol=1e-5, atol=1e-6)


def test_capturing_and_grouping_leave_no_hooks_behind():
    model = ARCHITECTURES["llama"].build()
    _, blocks = find_blocks(model)
    inputs = capture_inputs(WholeModel(model), token_batches(2))
    find_waves(blocks[0], inputs[0])
    entering(blocks[0], inputs[0], 0, blocks[0].mlp.down_proj)
    assert not any(module._forward_pre_hooks for module in model.modules())


@every_architecture
def test_a_linear_weight_is_out_by_in_and_writes_through(name):
    model = ARCHITECTURES[name].build()
    _, blocks = find_blocks(model)
    inputs = capture_inputs(WholeModel(model), token_batches(1))
    for linear in linears_of(blocks[0]).values():
        value = entering(blocks[0], inputs[0], 0, linear)
        weight = linear_weight(linear)
        with torch.inference_mode():
            expected = value @ weight.t() + (0 if linear.bias is None else linear.bias)
            torch.testing.assert_close(linear(value), expected, rtol=1e-4, atol=1e-5)
            weight.zero_()
        assert not linear.weight.any()


@every_architecture
def test_a_skeleton_counts_each_stored_weight_once(name):
    model = ARCHITECTURES[name].build()
    parameters = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    count = sum(parameter.numel() for parameter in parameters.values())
    assert dense_parameter_count(model.config) == count
    shapes = dense_parameter_shapes(model.config)
    for key, tensor in model.state_dict().items():
        if key not in tied_names(model):
            assert shapes.pop(key) == tuple(tensor.shape)
    assert not shapes


def test_blocks_can_be_named():
    model = ARCHITECTURES["llama"].build()
    assert find_blocks(model, "model.layers")[1] is model.model.layers


@pytest.mark.case(53)
def test_a_wrong_name_is_refused_with_the_lists_that_exist():
    model = ARCHITECTURES["llama"].build()
    with pytest.raises(ConfigError, match=r"model\.blocks 'model\.blocks'.*model\.layers"):
        find_blocks(model, "model.blocks")


@pytest.mark.case(53)
def test_a_model_without_blocks_is_refused_by_its_class():
    with pytest.raises(ConfigError, match=r"Sequential.*nn\.ModuleList.*model\.blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


class ParallelBlock(nn.Module):
    """Two linears of one input, one of an equal copy, one of a view, and one that is not run."""

    def __init__(self) -> None:
        super().__init__()
        self.third, self.second, self.first = (nn.Linear(4, 4) for _ in range(3))
        self.fourth = nn.Linear(2, 2)
        self.idle = nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.first(hidden) + self.second(hidden) + self.third(hidden.clone())
        self.fourth(hidden.reshape(1, -1, 2))
        return out


def test_equal_values_in_separate_tensors_make_separate_groups():
    block = ParallelBlock()
    del block.idle
    groups = groups_of(block, BlockInputs([torch.randn(1, 3, 4)], {1: ((), {})}))
    assert [group.names for group in groups] == [("first", "second"), ("third",), ("fourth",)]


def test_weights_outside_of_linear_layers_are_refused_by_name():
    block = ParallelBlock()
    block.experts = nn.Parameter(torch.zeros(2, 4, 4))
    with pytest.raises(ConfigError, match=r"ParallelBlock.*experts"):
        linears_of(block)


@pytest.mark.case(52)
def test_a_state_space_model_is_refused_by_what_is_no_linear():
    sizes = {"hidden_size": 24, "state_size": 8, "vocab_size": 64, "num_hidden_layers": 2}
    model = MambaForCausalLM(MambaConfig(**sizes))
    path, blocks = find_blocks(model)
    assert path == "backbone.layers"
    with pytest.raises(
        ConfigError, match=r"MambaBlock .*mixer\.A_log \(48 x 8\).*looked for: linear"
    ):
        linears_of(blocks[0])


def test_a_linear_that_receives_nothing_is_refused_by_name():
    with pytest.raises(SourceError, match="idle"):
        find_waves(ParallelBlock(), BlockInputs([torch.randn(1, 3, 4)], {1: ((), {})}))
