from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.decodings import as_key, describe_decoding, same_decoding, with_steps


def test_other_steps_leave_a_list_of_tokens_out() -> None:
    assert with_steps(DecodingConfig(2, tokens_per_step=(1, 15)), 3) == DecodingConfig(3)


def test_a_decoding_of_an_older_version_is_known_and_one_of_another_is_not() -> None:
    assert same_decoding(
        {"num_steps": 4, "sampling_temperature": [1.2, 0.8]}, DecodingConfig(4, sampling_temperature=(1.2, 0.8))
    )
    assert not same_decoding({"num_steps": 4, "gone": 1}, DecodingConfig(4))


def test_a_key_is_the_same_for_what_is_left_out_and_what_is_said_as_usual() -> None:
    assert as_key(DecodingConfig()) == as_key(DecodingConfig(sampling_temperature=1.0, top_k=None))
    assert as_key(DecodingConfig()) != as_key(DecodingConfig(sampling_temperature=0.9))


def test_a_decoding_is_told_without_what_is_as_usual() -> None:
    assert describe_decoding(DecodingConfig(8)) == "T 8, confidence, guidance constant"
    told = describe_decoding(
        DecodingConfig(
            4, guidance="linear", sampling_temperature=(1.2, 0.6), top_k=9, mask_schedule={"name": "pow", "exponent": 2}
        ),
        steps=False,
    )
    assert told == "confidence, guidance linear, temperature 1.2 to 0.6, top_k 9, mask_schedule pow (exponent 2)"
