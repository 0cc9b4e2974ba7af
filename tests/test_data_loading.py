"""Datasets of every layout load with the right columns, damaged rows are named, and nothing comes from the network."""

import io
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from apm_hf.data.images import ImageCollator, decode_image
from apm_hf.data.loading import load_images, train_and_validation
from apm_hf.image_processing_pil_apm import APMImageProcessorPil

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def quiet_private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    # After shuffling a stream, datasets 5 waits five seconds for its threads; there is little to wait for here.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    datasets.disable_progress_bars()


def encoded(seed=0, mode="RGB", size=(7, 6), file_format="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, file_format)
    return buffer.getvalue()


def make_dataset(num_rows, first=0, column="image", **columns):
    """Rows whose image is made from the seed in column `id`."""
    ids = range(first, first + num_rows)
    data = datasets.Dataset.from_dict({column: [{"bytes": encoded(i), "path": f"{i}.png"} for i in ids], "id": ids})
    data = data.cast_column(column, datasets.Image())
    for name, values in columns.items():
        values, feature = values if isinstance(values, tuple) else (values, None)
        data = data.add_column(name, values, feature=feature)
    return data


@pytest.fixture
def two_splits(tmp_path):
    """A folder of parquet shards under `data/`, with ClassLabel metadata: 10 training rows, 4 test rows."""
    names = datasets.ClassLabel(names=["cat", "dog"])
    (tmp_path / "data").mkdir()
    make_dataset(10, label=([0, 1] * 5, names)).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    make_dataset(4, first=10, label=([1, 0] * 2, names)).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    return tmp_path


def ids(data):
    return [row["id"] for row in data.dataset]


# --- layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_parquet_shards_tells_its_columns_and_class_names(two_splits, streaming):
    data = load_images(two_splits, streaming=streaming)
    assert isinstance(data.dataset, datasets.IterableDataset if streaming else datasets.Dataset)
    assert (data.image_column, data.label_column, data.split) == ("image", "label", "train")
    assert data.class_names == ["cat", "dog"] and data.require_labels() == "label"
    assert ids(data) == list(range(10)) and ids(load_images(two_splits, split="test")) == list(range(10, 14))
    row = next(iter(data.dataset))
    assert np.array_equal(np.array(decode_image(row["image"])), np.array(decode_image(encoded(0))))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_images_names_classes_after_its_folders(tmp_path, streaming):
    for seed, name in enumerate(["cat/0.png", "cat/1.jpg", "dog/2.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(seed, file_format="PNG" if name.endswith("png") else "JPEG"))
    data = load_images(tmp_path, streaming=streaming)
    assert data.class_names == ["cat", "dog"]
    assert [row["label"] for row in data.dataset] == [0, 0, 1]
    assert all(decode_image(row["image"]).size == (7, 6) for row in data.dataset)
    (tmp_path / "dog/2.png").write_bytes(b"junk")
    row = list(load_images(tmp_path, streaming=streaming).dataset)[2]  # still there, to be named when decoded
    with pytest.raises(ValueError, match="cannot decode '.*dog/2.png'"):
        decode_image(row["image"])


def test_a_flat_folder_of_images_has_no_labels(tmp_path):
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(encoded(seed))
    data = load_images(tmp_path)
    assert data.label_column is None and data.class_names is None and len(data.dataset) == 3
    with pytest.raises(ValueError, match=r"found no labels among the columns \['image'\]"):
        data.require_labels()


@pytest.mark.parametrize(("file", "split"), [("test-00000-of-00001.parquet", "test"), ("photos.parquet", "train")])
def test_one_parquet_file_is_the_split_that_its_name_says(tmp_path, file, split):
    make_dataset(3, column="photo").to_parquet(tmp_path / file)
    data = load_images(tmp_path / file)
    assert (data.split, data.image_column, len(data.dataset)) == (split, "photo", 3)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_saved_to_disk_loads_and_stays_as_it_is(tmp_path, streaming):
    splits = {"train": make_dataset(6), "validation": make_dataset(3, first=6)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    splits["train"].save_to_disk(tmp_path / "single")
    files = sorted(tmp_path.rglob("*"))
    train, validation = train_and_validation(tmp_path / "both", streaming=streaming, max_images=4)
    assert (train.split, validation.split, len(ids(train)), ids(validation)) == ("train", "validation", 4, [6, 7, 8])
    assert ids(load_images(tmp_path / "single", streaming=streaming)) == list(range(6))
    train, validation = train_and_validation(tmp_path / "single", validation_fraction=0.5)
    assert sorted(ids(train) + ids(validation)) == list(range(6))
    assert sorted(tmp_path.rglob("*")) == files


def test_a_configuration_is_chosen_after_a_colon(tmp_path):
    lines = ["---", "configs:"]
    for number, config in enumerate(["small", "large"]):
        (tmp_path / config).mkdir()
        make_dataset(2, first=10 * number).to_parquet(tmp_path / config / "train.parquet")
        lines += [f"- config_name: {config}", f"  data_files: {config}/train.parquet"]
    (tmp_path / "README.md").write_text("\n".join([*lines, "---", ""]))
    assert ids(load_images(f"{tmp_path}:large")) == [10, 11]
    for name in (str(tmp_path), f"{tmp_path}:medium"):
        with pytest.raises(ValueError, match=rf"(?s)'small', 'large'.*{tmp_path}:CONFIG"):
            load_images(name)


def test_parquet_from_other_tools_loads_by_its_contents(tmp_path):
    table = datasets.Dataset.from_dict({"jpg": [encoded(1)], "cls": [3], "text": ["a"]})
    table.to_parquet(tmp_path / "train.parquet")
    data = load_images(tmp_path, label_column="cls")
    assert (data.image_column, data.label_column, data.class_names) == ("jpg", "cls", None)
    assert decode_image(data.dataset[0]["jpg"]).size == (7, 6)


def test_a_column_of_paths_loads_when_named(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(1))
    datasets.Dataset.from_dict({"file": [str(tmp_path / "a.png")]}).save_to_disk(tmp_path / "saved")
    data = load_images(tmp_path / "saved", image_column="file")
    assert decode_image(data.dataset[0]["file"]).size == (7, 6)


def test_missing_places_and_other_files_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="got the file '.*notes.txt'"):
        load_images(tmp_path / "notes.txt")
    for name in (tmp_path / "nothing", "./nothing", "~/no/such/place"):
        with pytest.raises(FileNotFoundError, match="no file or folder"):
            load_images(name)


def test_a_missing_datasets_package_names_the_extra(two_splits, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "apm_hf\[train\]"'):
        load_images(two_splits)


# --- splits -------------------------------------------------------------------------------------------------------


def test_an_unknown_or_undecided_split_lists_the_splits(two_splits, tmp_path):
    with pytest.raises(ValueError, match=r"no split 'val'; choose one of \['train', 'test'\] with --split"):
        load_images(two_splits, split="val")
    with pytest.raises(ValueError, match="with --validation_split"):
        train_and_validation(two_splits, validation_split="val")
    datasets.DatasetDict({"a": make_dataset(1), "b": make_dataset(1)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"several splits; choose one of \['a', 'b'\] with --split"):
        load_images(tmp_path / "saved")


def test_slices_and_sums_of_splits_are_understood(two_splits):
    assert ids(load_images(two_splits, split="train[:2]+test[3:]")) == [0, 1, 13]
    with pytest.raises(ValueError, match=r"a stream has no parts .* choose one of \['train', 'test'\]"):
        load_images(two_splits, split="train[:2]", streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_existing_test_split_validates(two_splits, streaming, caplog):
    with caplog.at_level("INFO"):
        train, validation = train_and_validation(two_splits, streaming=streaming)
    assert ids(train) == list(range(10)) and ids(validation) == list(range(10, 14))
    assert (train.split, validation.split) == ("train", "test")
    assert "validating on split 'test'" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_without_a_validation_split_a_part_is_held_out(tmp_path, streaming, caplog):
    make_dataset(20).to_parquet(tmp_path / "train.parquet")
    options = {"validation_fraction": 0.25, "streaming": streaming}
    if streaming:  # a bare parquet stream does not know its length
        with pytest.raises(ValueError, match="does not say its length.*--validation_split"):
            train_and_validation(tmp_path, **options)
        load_images(tmp_path)  # prepares the dataset, after which its length is known
    with caplog.at_level("INFO"):
        train, validation = train_and_validation(tmp_path, **options)
    assert len(ids(validation)) == 5 and sorted(ids(train) + ids(validation)) == list(range(20))
    assert "holding out 5 of 20 images of 'train'" in caplog.text
    again = train_and_validation(tmp_path, **options)
    assert (ids(again[0]), ids(again[1])) == (ids(train), ids(validation))
    if not streaming:
        other = train_and_validation(tmp_path, seed=1, **options)[1]
        assert ids(other) != ids(validation)


def test_a_saved_part_does_not_go_by_the_length_of_the_whole(tmp_path):
    make_dataset(20).to_parquet(tmp_path / "train.parquet")
    part = load_images(tmp_path / "train.parquet", max_images=6).dataset
    assert part.info.splits["train"].num_examples == 20
    path = save(tmp_path, part)
    with pytest.raises(ValueError, match="does not say its length"):
        train_and_validation(path, streaming=True, validation_fraction=0.5)
    train, validation = train_and_validation(path, validation_fraction=0.5)
    assert len(ids(train)) == len(ids(validation)) == 3


def test_training_on_every_split_holds_out_instead_of_leaking(two_splits):
    train, validation = train_and_validation(two_splits, split="train+test", validation_fraction=0.5)
    assert sorted(ids(train) + ids(validation)) == list(range(14))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 0.999])
def test_holding_out_nothing_or_everything_is_refused(tmp_path, fraction):
    make_dataset(3).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="validation"):
        train_and_validation(tmp_path, validation_fraction=fraction)


@pytest.mark.parametrize("streaming", [False, True])
def test_max_images_takes_the_first_or_a_seeded_subset(two_splits, streaming):
    def load(**options):
        return ids(load_images(two_splits, streaming=streaming, **options))

    assert load(max_images=3) == [0, 1, 2] and load(max_images=99) == list(range(10))
    drawn = load(max_images=5, seed=1)
    assert len(set(drawn)) == 5 and drawn == load(max_images=5, seed=1) and drawn != load(max_images=5, seed=2)
    assert drawn != list(range(5))
    with pytest.raises(ValueError, match="max_images=0"):
        load(max_images=0)


# --- columns ------------------------------------------------------------------------------------------------------


def save(tmp_path, dataset):
    dataset.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_none_or_several_image_columns_name_the_flag(tmp_path):
    mask = make_dataset(2).rename_column("image", "mask").remove_columns("id")
    both = datasets.concatenate_datasets([make_dataset(2), mask], axis=1)
    path = save(tmp_path, both)
    with pytest.raises(ValueError, match=r"several image columns, \['image', 'mask'\],.*--image_column"):
        load_images(path)
    data = load_images(path, image_column="mask")
    assert data.image_column == "mask" and set(data.dataset[0]["image"]) == {"bytes", "path"}  # neither is decoded
    for column in ("id", "photo"):
        with pytest.raises(ValueError, match=f"column '{column}'; the columns are .*--image_column"):
            load_images(path, image_column=column)
    with pytest.raises(ValueError, match=r"no image column among \['id'\].*--image_column"):
        load_images(save(tmp_path / "none", make_dataset(2).remove_columns("image")))


def test_label_columns_are_found_by_name_then_by_type(tmp_path):
    fine, coarse = datasets.ClassLabel(names=["a", "b"]), datasets.ClassLabel(names=["x"])
    cifar100 = make_dataset(2, coarse_label=([0, 0], coarse), fine_label=([0, 1], fine))
    data = load_images(save(tmp_path / "named", cifar100))
    assert (data.label_column, data.class_names) == ("fine_label", ["a", "b"])
    data = load_images(tmp_path / "named/saved", label_column="coarse_label")
    assert (data.label_column, data.class_names) == ("coarse_label", ["x"])
    data = load_images(save(tmp_path / "typed", cifar100.remove_columns("fine_label")))
    assert data.label_column == "coarse_label"
    several = cifar100.rename_column("fine_label", "other_label")
    with pytest.raises(ValueError, match=r"\['coarse_label', 'other_label'\]; name one with --label_column"):
        load_images(save(tmp_path / "several", several))
    for column in ("image", "nothing"):
        with pytest.raises(ValueError, match=f"column '{column}'.*integer columns are .*--label_column"):
            load_images(tmp_path / "named/saved", label_column=column)


def test_a_text_label_column_is_no_label_column(tmp_path):
    path = save(tmp_path, make_dataset(2, label=["cat", "dog"]))
    assert load_images(path).label_column is None
    with pytest.raises(ValueError, match="'label' holds no integers"):
        load_images(path, label_column="label")


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([1, 0, 1], ["dog", "cat", "dog"], ["cat", "dog"]),
        ([1, 0, 1], ["dog", "cat", "wolf"], None),  # two names for one label
        ([2, 0, 2], ["dog", "cat", "dog"], None),  # nothing is known of label 1
        ([1, 0, 1], ["dog", None, "dog"], None),
        ([-1, 0, 0], ["?", "cat", "cat"], None),
    ],
)
def test_names_beside_integer_labels_count_if_they_are_consistent(tmp_path, labels, names, expected):
    data = load_images(save(tmp_path, make_dataset(3, label=labels, name=names)))
    assert (data.label_column, data.class_names) == ("label", expected)


def test_names_are_taken_before_images_are_left_out(tmp_path):
    path = save(tmp_path, make_dataset(3, label=[0, 1, 2], name=["a", "b", "c"]))
    assert load_images(path, max_images=1).class_names == ["a", "b", "c"]


def test_wordnet_ids_are_taken_off_class_names(tmp_path):
    names = datasets.ClassLabel(names=["n01440764_tench", "n01443537", "nearby_n01440764_x"])
    data = load_images(save(tmp_path, make_dataset(1, label=([0], names))))
    assert data.class_names == ["tench", "n01443537", "nearby_n01440764_x"]


# --- decoding -----------------------------------------------------------------------------------------------------


def test_every_form_of_an_image_decodes_alike(tmp_path):
    data = encoded(3)
    (tmp_path / "a.png").write_bytes(data)
    expected = np.array(Image.open(io.BytesIO(data)))
    forms = [Image.open(io.BytesIO(data)), data, bytearray(data), memoryview(data), tmp_path / "a.png"]
    forms += [str(tmp_path / "a.png"), {"bytes": data, "path": "elsewhere.png"}, {"bytes": data}]
    forms += [{"bytes": None, "path": str(tmp_path / "a.png")}]
    for form in forms:
        assert np.array_equal(np.array(decode_image(form)), expected)


def test_images_inside_an_archive_decode(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.png", encoded(3))
    value = {"bytes": None, "path": f"zip://a.png::{tmp_path}/photos.zip"}
    assert np.array_equal(np.array(decode_image(value)), np.array(decode_image(encoded(3))))


def test_decoding_turns_images_upright_and_keeps_their_mode():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("I;16", (7, 6), 300).save(buffer, "PNG", exif=exif)
    image = decode_image(buffer.getvalue())
    assert (image.mode, image.size) == ("I;16", (6, 7))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "cannot decode 0 bytes"),
        (encoded(0, size=(64, 64))[:500], "cannot decode 500 bytes"),
        (encoded(0, size=(64, 64), file_format="JPEG")[:900], "cannot decode 900 bytes: image file is truncated"),
        ({"bytes": b"junk", "path": "x/7.png"}, "cannot decode 4 bytes of 'x/7.png'"),
        ({"bytes": None, "path": "no such file.png"}, "cannot decode 'no such file.png'"),
        ("http://localhost/a.png", "cannot decode 'http://localhost/a.png'"),
        ({"bytes": None, "path": None}, "got NoneType"),
        ({}, "got NoneType"),
        (None, "got NoneType"),
        (7, "got int"),
    ],
)
def test_what_cannot_be_decoded_is_named(value, message):
    with pytest.raises(ValueError, match=message):
        decode_image(value)


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="cannot decode .* bytes: .*decompression bomb"):
        decode_image(encoded(0))


# --- batches ------------------------------------------------------------------------------------------------------


def test_the_collator_makes_batches_for_student_and_teacher(two_splits):
    data = load_images(two_splits)
    collator = ImageCollator(
        image_processor=APMImageProcessorPil(size=8),
        image_column=data.image_column,
        label_column=data.label_column,
        teacher_image_processor=APMImageProcessorPil(size=4, do_min_max=True),
    )
    dataset = data.dataset.add_column("index", list(range(10)))
    batches = list(DataLoader(dataset, batch_size=4, collate_fn=pickle.loads(pickle.dumps(collator))))
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    assert set(batches[0]) == {"pixel_values", "teacher_pixel_values", "labels", "index"}
    assert torch.equal(torch.cat([batch["index"] for batch in batches]), torch.arange(10))
    assert batches[0]["labels"].dtype == torch.int64 and batches[0]["labels"].tolist() == [0, 1, 0, 1]
    images = [decode_image(encoded(i)) for i in range(4)]
    expected = APMImageProcessorPil(size=8)(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(batches[0]["pixel_values"], expected)
    assert batches[0]["teacher_pixel_values"].shape == (4, 3, 4, 4)


def test_a_stream_goes_through_the_collator(two_splits):
    data = load_images(two_splits, streaming=True)
    loader = DataLoader(data.dataset, batch_size=4, collate_fn=ImageCollator(APMImageProcessorPil(size=8)))
    assert [set(batch) for batch in loader] == 3 * [{"pixel_values"}]


def test_the_teacher_sees_deep_and_transparent_images_as_the_student_does():
    deep = np.linspace(0, 65535, 42).reshape(6, 7).astype(np.uint16)
    transparent = Image.new("RGBA", (7, 6), (255, 0, 0, 51))
    processor = APMImageProcessorPil(do_resize=False, do_normalize=False)
    seen = []

    def teacher(image, return_tensors):
        seen.append(image)
        return processor(image, return_tensors=return_tensors)

    rows = [{"image": Image.fromarray(deep)}, {"image": transparent}]
    batch = ImageCollator(processor, teacher_image_processor=teacher)(rows)
    assert [image.mode for image in seen] == ["RGB", "RGB"]
    torch.testing.assert_close(batch["teacher_pixel_values"], batch["pixel_values"], rtol=0, atol=0.51 / 255)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"image": {"bytes": b"junk", "path": "7.png"}, "label": 1},
            "row 1 of the batch: cannot decode 4 bytes of '7.png'",
        ),
        ({"image": b"", "label": 1, "index": 7000}, "row 7000: cannot decode 0 bytes"),
        ({"image": encoded(0), "label": None}, "row 1 of the batch: expected an integer in column 'label', got None"),
        ({"image": encoded(0), "label": "cat"}, "got 'cat'"),
        ({"img": encoded(0), "label": 1}, r"no column 'image' but \['img', 'label'\]; name it with --image_column"),
        ({"image": Image.fromarray(np.full((2, 2), np.nan, np.float32)), "label": 1}, "row 1 .*: images: .*NaN"),
    ],
)
def test_the_collator_names_the_row_it_cannot_use(row, message):
    collator = ImageCollator(APMImageProcessorPil(size=8), label_column="label")
    with pytest.raises(ValueError, match=message):
        collator([{"image": encoded(1), "label": 0}, row])


# --- real data ----------------------------------------------------------------------------------------------------


def test_cifar10_loads_with_its_test_split(shared_dir):
    train, test = train_and_validation(
        shared_dir / "data/cifar10", streaming=True, max_images=8, max_validation_images=4
    )
    assert (train.image_column, train.label_column, test.split) == ("img", "label", "test")
    assert train.class_names == test.class_names and train.class_names[:2] == ["airplane", "automobile"]
    collator = ImageCollator(APMImageProcessorPil(size=32), image_column="img", label_column="label")
    batch = next(iter(DataLoader(train.dataset, batch_size=8, collate_fn=collator)))
    assert batch["pixel_values"].shape == (8, 3, 32, 32) and batch["pixel_values"].std() > 0.5


def test_imagenet_sample_has_readable_class_names(shared_dir):
    data = load_images(shared_dir / "data/imagenet_sample1k")
    assert len(data.dataset) == len(data.class_names) == 1000
    assert all(data.class_names[row["label"]] == row["name"] for row in data.dataset.remove_columns("image"))


def test_street_photos_with_masks_ask_which_column_holds_the_images(shared_dir):
    with pytest.raises(ValueError, match=r"\['image', 'part_mask', 'object_mask'\].*--image_column"):
        load_images(shared_dir / "data/parts/ccp100")
    data = load_images(shared_dir / "data/parts/ccp100", image_column="image", max_images=2)
    assert data.split == "test" and decode_image(data.dataset[1]["part_mask"]).mode == "L"
