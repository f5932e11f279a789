import pytest
import torch

from maskgit_pl.training.strategies import _POLICIES, PRECISIONS, build_strategy, check_precision, check_strategy


def test_weights_are_gathered_in_bfloat16_and_gradients_summed_in_float32_where_the_precision_is_mixed():
    mixed = _POLICIES["bf16-mixed"]
    assert (mixed.param_dtype, mixed.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert not mixed.cast_forward_inputs  # only autocast decides the dtypes between blocks
    whole = _POLICIES["32-true"]
    assert (whole.param_dtype, whole.reduce_dtype, whole.output_dtype) == (None, None, None)


@pytest.mark.parametrize("name", PRECISIONS)
def test_precisions_that_train_have_a_policy_and_are_let_through(name):
    check_precision(name)
    assert name in _POLICIES


@pytest.mark.parametrize("name", ["bf16-true", "16-true", "16-mixed", "64-true"])
def test_others_are_refused_with_those_that_train(name):
    with pytest.raises(ValueError, match=rf"trainer\.precision must be 32-true or bf16-mixed, got {name}"):
        check_precision(name)


def test_an_unknown_strategy_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"trainer\.strategy 'fsdp2': did you mean 'fsdp'"):
        build_strategy("fsdp2")


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_several_ranks_need_a_strategy_and_one_does_not(stage):
    check_strategy("auto", stage=stage, ranks=1)
    check_strategy("ddp", stage=stage, ranks=2)
    with pytest.raises(ValueError, match=r"trainer\.strategy must .*for 2 ranks, got 'auto'"):
        check_strategy("auto", stage=stage, ranks=2)


def test_the_tokenizer_is_not_sharded_on_any_number_of_ranks():
    check_strategy("fsdp", stage="transformer", ranks=2)
    for ranks in (1, 2):
        with pytest.raises(ValueError, match=r"trainer\.strategy must .*got 'fsdp'; use --cluster ddp"):
            check_strategy("fsdp", stage="tokenizer", ranks=ranks)
