"""A packed embedding looks up what a dense one does, and a tied head multiplies by its table."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from packed_matrices import random_weight
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from claq_exp.runtime import kernels
from claq_exp.runtime.embedding import QuantizedEmbedding
from claq_exp.runtime.kernels.triton import TritonKernel
from claq_exp.runtime.linear import QuantizedLinear
from claq_exp.runtime.packed import packed_modules

ROWS, WIDTH = 50, 12
TABLES = {
    "plain": lambda: nn.Embedding(ROWS, WIDTH),
    "padded": lambda: nn.Embedding(ROWS, WIDTH, padding_idx=3),
    "padded from the end": lambda: nn.Embedding(ROWS, WIDTH, padding_idx=-1),
    "gemma": lambda: Gemma3TextScaledWordEmbedding(ROWS, WIDTH, 0, embed_scale=WIDTH**0.5),
    "bart": lambda: BartScaledWordEmbedding(ROWS, WIDTH, 1, embed_scale=3.3),
}
FORMS = {
    "columns": {"widths": (8,)},
    "mixed": {"widths": (3, 5), "reserved": 0.1},
    "grid": {"widths": (4,), "group_size": 5},
}
TOKENS = torch.tensor([[3, 0, 49, 3], [7, 7, 1, 48]])


def packed(table: nn.Embedding, dtype: torch.dtype = torch.float32, **form) -> QuantizedEmbedding:
    weight = random_weight(ROWS, WIDTH, **form)
    module = QuantizedEmbedding(weight.layout(), copy.deepcopy(table), dtype=dtype)
    stored = {f"{suffix}": tensor for suffix, tensor in weight.pack().items()}
    module.load_state_dict(stored, strict=True)
    return module


def dense(table: nn.Embedding, dtype: torch.dtype = torch.float32, **form) -> nn.Embedding:
    table = copy.deepcopy(table)
    weight = random_weight(ROWS, WIDTH, **form).dequantize().to(dtype)
    table.weight = nn.Parameter(weight, requires_grad=False)
    return table


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", TABLES.values(), ids=TABLES)
def test_it_looks_up_what_a_dense_one_does_bit_for_bit(build, dtype, form):
    table = build()
    found, expected = packed(table, dtype, **form), dense(table, dtype, **form)
    for tokens in (TOKENS, TOKENS.int(), TOKENS[0, 1], TOKENS[:0], TOKENS[:, None]):
        assert torch.equal(found(tokens), expected(tokens))
        assert found(tokens).dtype == dtype


def test_it_describes_itself_as_the_table_that_it_replaces():
    module = packed(TABLES["padded"](), widths=(4,))
    assert (module.num_embeddings, module.embedding_dim, module.padding_idx) == (ROWS, WIDTH, 3)
    assert "50, 12, bits=4" in repr(module)
    assert set(module.state_dict()) == {"codes_4", "codebooks_4"}
    assert not list(module.parameters())


@pytest.mark.parametrize("build", TABLES.values(), ids=TABLES)
def test_a_cast_changes_the_type_of_rows_and_keeps_those_of_stored_tensors(build):
    table = build()
    module = packed(table, widths=(5,)).to(torch.bfloat16)
    assert {t.dtype for t in module.stored_tensors().values()} == {torch.uint8, torch.float16}
    expected = dense(table, widths=(5,)).to(torch.bfloat16)
    assert torch.equal(module(TOKENS), expected(TOKENS))


@pytest.mark.parametrize("build", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_looks_up_the_same(build, again):
    module = packed(build(), widths=(3,))
    expected = module(TOKENS)
    assert torch.equal(again(module)(TOKENS), expected)


def test_numbers_that_changed_in_place_are_seen():
    module = packed(TABLES["plain"](), widths=(4,))
    module(TOKENS)
    other = random_weight(ROWS, WIDTH, (4,), seed=1)
    module.load_state_dict(other.pack())
    assert torch.equal(module(TOKENS), other.dequantize()[TOKENS])


@pytest.mark.parametrize("token", [-1, ROWS])
def test_a_token_that_the_table_has_not_is_refused(token):
    with pytest.raises(IndexError, match=str(ROWS)):
        packed(TABLES["plain"](), widths=(4,))(torch.tensor([token]))


@pytest.fixture
def on_triton(monkeypatch):
    """Have the kernel of GPUs look rows up, in its interpreter; yields what it was asked for."""
    pytest.importorskip("triton")
    asked, rows = [], TritonKernel.rows

    def noted(self, operand, index, dtype):
        asked.append(index)
        return rows(self, operand, index, dtype)

    monkeypatch.setattr(TritonKernel, "rows", noted)
    monkeypatch.setattr(kernels, "LOOKUP", {"cpu": TritonKernel})
    return asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where a GPU is")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_kernel_of_gpus_looks_the_same_up(form, on_triton):
    table = TABLES["gemma"]()
    module, expected = packed(table, torch.float16, **form), dense(table, torch.float16, **form)
    for tokens in (TOKENS, TOKENS[:0], TOKENS[0, 1]):
        assert torch.equal(module(tokens), expected(tokens))
    assert len(on_triton) == 4  # the check, once


def test_a_kernel_that_gives_other_rows_is_not_used(on_triton, monkeypatch):
    right = TritonKernel.rows
    monkeypatch.setattr(TritonKernel, "rows", lambda *given: right(*given) + 1)
    table = TABLES["plain"]()
    with pytest.warns(RuntimeWarning, match="gives other rows than the reference"):
        found = packed(table, widths=(8,))(TOKENS)
    assert torch.equal(found, dense(table, widths=(8,))(TOKENS))


class Tied(nn.Module):
    """An embedding and the head that shares its table."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.table = packed(TABLES["plain"](), widths=(4,))
        self.head = QuantizedLinear(
            self.table.layout, bias=True, dtype=torch.float32, kernel=kernel, shared=self.table
        )
        self.head.bias.copy_(torch.arange(ROWS))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(tokens))


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("again", [lambda m: m, copy.deepcopy], ids=["itself", "copy"])
@torch.no_grad()
def test_a_tied_head_multiplies_by_the_table_and_stores_nothing(kernel, again):
    model = again(Tied(kernel))
    weight = random_weight(ROWS, WIDTH, (4,)).dequantize()
    expected = weight[TOKENS] @ weight.t() + torch.arange(ROWS)
    torch.testing.assert_close(model(TOKENS), expected)
    assert model.head.operand() is model.table.operand()
    assert model.head.shared is model.table
    assert set(model.state_dict()) == {"table.codes_4", "table.codebooks_4", "head.bias"}
    assert packed_modules(model) == {"table": model.table}
    torch.testing.assert_close(model.head.dequantize(), weight)
    cast = model.to(torch.float16)
    assert cast.head.bias.dtype == torch.float16
    assert cast(TOKENS).dtype == torch.float16


def test_gradients_pass_through_a_tied_head():
    model = Tied("reference")
    inputs = torch.randn(3, WIDTH, requires_grad=True)
    model.head(inputs).square().sum().backward()
    weight = random_weight(ROWS, WIDTH, (4,)).dequantize()
    again = inputs.detach().clone().requires_grad_()
    (again @ weight.t() + torch.arange(ROWS)).square().sum().backward()
    torch.testing.assert_close(inputs.grad, again.grad)
