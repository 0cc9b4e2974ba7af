"""APMConfig: presets, nonsense, and the ways it is stored and copied."""

import copy
import json
import pickle

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, CLIPTextConfig

from apm_hf import APMConfig

PRESETS = {
    "dinov2-large": {
        "image_size": 448,
        "patch_size": 14,
        "position_size": 1024,
        "hidden_sizes": [4096, 4096, 4096, 2048, 1024],
        "feature_size": 1024,
        "rgb_hidden_sizes": [256, 256],
        "use_rgb_head": True,
        "pooling": "mean",
        "trigger_source": "conv",
        "local_patch": False,
    },
    "clip-ttt": {
        "image_size": 448,
        "patch_size": 14,
        "position_size": 1024,
        "hidden_sizes": [4096, 2048, 1024],
        "feature_size": 768,
        "rgb_hidden_sizes": [256, 256],
        "use_rgb_head": True,
        "pooling": "attention",
        "pooling_num_heads": 8,
        "trigger_source": "conv",
        "local_patch": False,
    },
}

NONSENSE = [
    ({"image_size": 450}, r"image_size: expected a multiple of patch_size=14, got .*450"),
    ({"patch_size": 13}, r"image_size: expected a multiple of patch_size=13, got .*448"),
    ({"position_size": 1022}, r"position_size: expected a multiple of 4.*got 1022"),
    ({"pooling": "max"}, r"pooling: expected one of \['mean', 'attention'\], got 'max'"),
    (
        {"trigger_source": "teacher"},
        r"trigger_source: expected one of \['conv', 'embedding', 'columns', 'tokens'\], got",
    ),
    ({"image_size": 0}, r"image_size: expected a positive integer, got 0"),
    ({"hidden_sizes": [10**10]}, r"sizes: expected at most 1,048,576 everywhere, got 10,000,000,000"),
    ({"feature_size": 10**10}, r"sizes: expected at most 1,048,576 everywhere"),
    ({"image_size": -448}, r"image_size: expected a positive integer, got -448"),
    ({"patch_size": 0}, r"patch_size: expected a positive integer, got 0"),
    ({"num_channels": 0}, r"num_channels: expected a positive integer, got 0"),
    ({"trigger_channels": 0}, r"trigger_channels: expected a positive integer, got 0"),
    ({"feature_size": 0}, r"feature_size: expected a positive integer, got 0"),
    ({"position_size": 0}, r"position_size: expected a positive integer, got 0"),
    ({"hidden_sizes": []}, r"hidden_sizes: expected at least one positive width, got \[\]"),
    ({"hidden_sizes": [64, 0]}, r"hidden_sizes: expected at least one positive width, got \[64, 0\]"),
    ({"rgb_hidden_sizes": [64, -1]}, r"rgb_hidden_sizes: expected positive widths, got \[64, -1\]"),
    ({"hidden_act": "rleu"}, r"hidden_act: expected one of .*'relu'.* got 'rleu'"),
    ({"initializer_range": 0.0}, r"initializer_range: expected a positive number, got 0"),
    ({"initializer_range": float("nan")}, r"initializer_range: expected a positive number, got nan"),
    ({"pooling": "attention", "pooling_num_heads": 7}, r"pooling_num_heads: expected a divisor of .*1024, got 7"),
    ({"pooling": "attention", "pooling_num_heads": 0}, r"pooling_num_heads: expected a divisor of .*1024, got 0"),
    (
        {"pooling": "attention", "pooling_num_heads": 2, "feature_size": 30},
        r"feature_size: expected a multiple of 4 .*got 30",
    ),
    ({"trigger_size": 5}, r"trigger_size: .*1024, got 5"),
    ({"trigger_source": "embedding", "trigger_size": 0}, r"trigger_size: expected a positive integer, got 0"),
    ({"text_config": {"hidden_size": 8}}, r"text_config: expected a key 'model_type', got \['hidden_size'\]"),
]


@pytest.mark.parametrize(("name", "expected"), PRESETS.items(), ids=PRESETS)
def test_preset_is_the_published_architecture(name, expected):
    config = APMConfig.preset(name)
    assert {field: getattr(config, field) for field in expected} == expected
    assert (config.grid_size, config.num_locations, config.trigger_width) == (32, 1024, 1024)
    assert config.query_width == 2048


def test_tiny_preset_is_valid_and_small():
    config = APMConfig.preset("tiny")
    assert config.num_locations <= 256
    assert max(config.hidden_sizes) <= 256


def test_overrides_replace_fields_of_a_preset():
    config = APMConfig.preset("clip-ttt", feature_size=512, pooling_num_heads=16)
    assert (config.feature_size, config.pooling_num_heads, config.pooling) == (512, 16, "attention")


def test_unknown_preset_says_which_there_are():
    with pytest.raises(
        ValueError,
        match=r"expected one of \['clip-ttt', 'dense', 'dinov2-large', 'paper', 'student', 'tiny'\], got 'clip'",
    ):
        APMConfig.preset("clip")


@pytest.mark.parametrize(("fields", "message"), NONSENSE, ids=[str(fields) for fields, _ in NONSENSE])
def test_nonsense_says_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        APMConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 14, "image_size": 224}, "patch_size: expected a power of 2 with trigger_source='columns'"),
        ({"num_column_blocks": -1}, "num_column_blocks: expected 0, or more"),
        ({"trigger_source": "conv"}, "num_column_blocks: expected 0, or more with trigger_source='columns', got 3"),
        ({"trigger_size": 5}, "trigger_size: expected trigger_channels with trigger_source='columns', that is 192"),
    ],
    ids=str,
)
def test_local_columns_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        APMConfig.preset("student", **fields)


def test_nonsense_in_overrides_is_an_error():
    with pytest.raises(ValueError, match="position_size: expected a multiple of 4"):
        APMConfig.preset("tiny", position_size=62)


@pytest.mark.parametrize("build", [APMConfig, lambda **fields: APMConfig.preset("tiny", **fields)])
def test_misspelt_field_names_the_nearest_one(build):
    with pytest.raises(ValueError, match=r"'hiden_sizes'.*did you mean 'hidden_sizes'"):
        build(hiden_sizes=[8])
    with pytest.raises(ValueError, match=r"'pool_num_heads'.*did you mean 'pooling_num_heads'"):
        build(pool_num_heads=8)


def test_field_unlike_any_other_lists_the_fields():
    with pytest.raises(ValueError, match=r"no field 'zzz'.*feature_size.*hidden_sizes"):
        APMConfig(zzz=1)


@pytest.mark.parametrize("value", ["448", 448.0, None, (448, 448)], ids=repr)
def test_value_of_another_type_is_an_error(value):
    with pytest.raises((ValueError, StrictDataclassError), match=r"(?s)image_size.*expected"):
        APMConfig(image_size=value)


def test_heads_are_checked_only_where_pooling_is_attention():
    config = APMConfig.preset("tiny", pooling="mean", feature_size=30, pooling_num_heads=7)
    assert (config.feature_size, config.pooling_num_heads) == (30, 7)


def test_widths_follow_from_the_fields():
    config = APMConfig.preset("tiny", image_size=96, patch_size=8, trigger_channels=2, position_size=64)
    assert (config.grid_size, config.num_locations) == (12, 144)
    assert (config.trigger_width, config.local_patch_width, config.query_width) == (288, 0, 352)
    config = APMConfig.preset("tiny", image_size=96, patch_size=8, num_channels=4, position_size=64, local_patch=True)
    assert (config.trigger_width, config.local_patch_width, config.query_width) == (144, 256, 464)


def test_trigger_of_an_embedding_is_as_wide_as_the_features_unless_told():
    assert APMConfig.preset("tiny", trigger_source="embedding", feature_size=20).trigger_width == 20
    assert APMConfig.preset("tiny", trigger_source="embedding", feature_size=20, trigger_size=28).trigger_width == 28


def test_whole_numbers_may_stand_for_real_ones():
    assert APMConfig(initializer_range=1).initializer_range == 1


STORED = [
    {},
    {"trigger_source": "embedding", "trigger_size": 12, "local_patch": True},
    {"pooling": "attention", "pooling_num_heads": 4, "use_rgb_head": False, "hidden_act": "gelu"},
    {"hidden_sizes": (8, 6), "rgb_hidden_sizes": (5,), "initializer_range": 1},
    {"num_labels": 5, "output_hidden_states": True},
    {"text_config": CLIPTextConfig(hidden_size=8, num_hidden_layers=1), "text_projection": False},
]


@pytest.mark.parametrize("fields", STORED, ids=[",".join(fields) or "tiny" for fields in STORED])
class TestStoring:
    def test_json_round_trip(self, fields):
        config = APMConfig.preset("tiny", **fields)
        assert APMConfig.from_dict(json.loads(config.to_json_string(use_diff=False))).to_dict() == config.to_dict()
        assert APMConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()

    def test_save_and_load(self, fields, tmp_path):
        config = APMConfig.preset("tiny", **fields)
        config.save_pretrained(tmp_path)
        for loaded in (APMConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
            assert type(loaded) is APMConfig
            assert architecture(loaded) == architecture(config)

    def test_copies_are_equal_and_independent(self, fields):
        config = APMConfig.preset("tiny", **fields)
        for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            assert type(copied) is APMConfig
            assert copied.to_dict() == config.to_dict()
            copied.hidden_sizes.append(7)
            assert config.hidden_sizes[-1] != 7


def architecture(config: APMConfig) -> dict:
    return {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}


def test_text_config_is_loaded_as_its_own_class(tmp_path):
    APMConfig.preset("tiny", text_config=CLIPTextConfig(hidden_size=24)).save_pretrained(tmp_path)
    text_config = APMConfig.from_pretrained(tmp_path).text_config
    assert type(text_config) is CLIPTextConfig
    assert text_config.hidden_size == 24


@pytest.mark.parametrize("build", [APMConfig, lambda: APMConfig.preset("dinov2-large")], ids=["default", "preset"])
def test_changing_one_configuration_leaves_the_next_alone(build):
    first = build()
    first.hidden_sizes.append(3)
    first.rgb_hidden_sizes.clear()
    assert build().hidden_sizes == [4096, 4096, 4096, 2048, 1024]
    assert build().rgb_hidden_sizes == [256, 256]


def test_auto_config_knows_apm():
    config = AutoConfig.for_model("apm", feature_size=24)
    assert type(config) is APMConfig
    assert config.feature_size == 24


@pytest.mark.parametrize(
    "fields",
    [{"tie_word_embeddings": False}, {"use_cache": False}, {"output_attentions": True}, {"torch_dtype": "bfloat16"}],
    ids=str,
)
def test_fields_that_transformers_gives_every_model_are_accepted(fields):
    assert APMConfig.preset("tiny", **fields).feature_size == 144


def test_a_file_keeps_fields_of_its_user_and_of_the_trainer(tmp_path):
    config = APMConfig.preset("tiny", feature_size=20)
    config.use_cache, config.my_note = False, {"photos": [1, 2]}
    config.save_pretrained(tmp_path)
    loaded = APMConfig.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    again = APMConfig.from_pretrained(tmp_path)
    assert again.my_note == {"photos": [1, 2]} and again.feature_size == 20
    with pytest.raises(ValueError, match="no field 'my_note'"):
        APMConfig(my_note=1)


def test_the_width_of_the_features_has_the_name_that_other_code_looks_for():
    config = APMConfig.preset("tiny", feature_size=20)
    assert config.hidden_size == 20
    config.hidden_size = 24
    assert config.feature_size == 24 and "hidden_size" not in config.to_dict()
    with pytest.raises(ValueError, match="did you mean 'hidden_sizes'"):
        APMConfig(hidden_size=24)
