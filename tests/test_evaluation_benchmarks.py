"""Benchmarks: what is loaded is labelled rightly, and labels that are not are refused."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from apm_hf.data.corruptions import CORRUPTION_NAMES
from apm_hf.data.scenes import CLASS_NAMES, make_scene
from apm_hf.evaluation.labels.benchmarks import BENCHMARKS, LabelledImages, load_benchmark, scenes_benchmark
from apm_hf.evaluation.labels.label_maps import (
    NameOptions,
    build_label_map,
    check_label_map,
    read_class_names,
)

WNIDS = [f"n{10_000_000 + 37 * index}" for index in range(30)]
WORDS = [f"thing {chr(97 + index // 26)}{chr(97 + index % 26)}" for index in range(30)]  # sorted like their numbers


def picture(number: int) -> Image.Image:
    """Small, and its first pixel says which class it belongs to."""
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[...] = number
    return Image.fromarray(pixels)


def write_folders(root, folders, images_each=2):
    """`folders`: folder name -> true class, told by the pixels."""
    for name, number in folders.items():
        (root / name).mkdir(parents=True)
        for index in range(images_each):
            picture(number).save(root / name / f"{index}.png")
    return root


def assert_rightly_labelled(images: LabelledImages, names_of_numbers):
    assert len(images) > 0
    for index in range(len(images)):
        number = np.asarray(images.image(index))[0, 0, 0]
        assert images.class_names[images.label(index)] == names_of_numbers[number]


# Loading


def test_integer_folders_are_classes_in_the_order_of_integers(tmp_path):
    folder = write_folders(tmp_path / "v2", {str(number): number for number in range(30)})
    images = load_benchmark(folder, class_names=WORDS)
    assert images.class_names == WORDS  # and not 0, 1, 10, 11, ...
    assert_rightly_labelled(images, WORDS)
    assert list(images.labels) == sorted(images.labels, key=lambda label: str(label))  # the files do come so


def test_wordnet_folders_take_their_names_from_the_readme(tmp_path):
    folder = write_folders(tmp_path / "a", {wnid: number for number, wnid in enumerate(WNIDS)})
    lines = ["ImageNet-A, 30 classes", "", *(f"{wnid} {name}" for wnid, name in zip(WNIDS, WORDS, strict=True))]
    (folder / "README.txt").write_text("\n".join(reversed(lines)))
    images = load_benchmark(folder)
    assert images.class_names == WORDS and len(images) == 60
    assert_rightly_labelled(images, WORDS)


def test_wordnet_folders_with_names_are_read_as_names(tmp_path):
    names = [f"{wnid}_{name.replace(' ', '_')}" for wnid, name in zip(WNIDS, WORDS, strict=True)]
    folder = write_folders(tmp_path / "val", {name: number for number, name in enumerate(names)})
    assert_rightly_labelled(load_benchmark(folder), WORDS)


def test_a_missing_folder_is_refused_where_names_are_only_in_order(tmp_path):
    for kind, folders in (("numbers", [str(i) for i in range(30)]), ("ids", WNIDS)):
        wanted = {name: number for number, name in enumerate(folders) if number != 11}
        folder = write_folders(tmp_path / kind, wanted, images_each=1)
        with pytest.raises(ValueError, match="without gaps|expected 29 class names.* got 30"):
            load_benchmark(folder, class_names=WORDS)
        if kind == "ids":  # with a name for each id nothing can shift
            images = load_benchmark(folder, class_names=dict(zip(WNIDS, WORDS, strict=True)))
            assert_rightly_labelled(images, WORDS)


def test_a_registered_benchmark_refuses_a_copy_with_other_classes(tmp_path):
    folder = write_folders(tmp_path / "cifar", {name: 0 for name in ("cat", "dog")}, images_each=1)
    with pytest.raises(ValueError, match="expected 10 classes, got 2: cat, dog"):
        load_benchmark("cifar10", data=folder)


def test_numbers_without_names_are_refused(tmp_path):
    folder = write_folders(tmp_path / "x", {"0": 0, "1": 1}, images_each=1)
    with pytest.raises(ValueError, match=r"the classes are numbers \(0, 1\); expected `class_names`"):
        load_benchmark(folder)


def write_parquet(path, labels, feature=None, column="label", **more):
    columns = {"picture": [picture(0)] * len(labels), column: labels, **more}
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            column: feature or datasets.Value("int64"),
            **{name: datasets.Value("string") for name in more},
        }
    )
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


def test_a_copy_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder 'imagenet-a'"):
        load_benchmark("imagenet_a", data="imagenet-a")


def test_hidden_labels_are_refused(tmp_path):
    path = write_parquet(tmp_path / "test.parquet", [-1, -1])
    with pytest.raises(ValueError, match="expected labels from 0 to 9, 10 in all, got -1"):
        load_benchmark("cifar10_1", data=path)


def test_text_labels_are_classes_even_if_a_subset_lacks_some(tmp_path):
    texts, names = list(np.repeat(WNIDS[:5], 4)), list(np.repeat(WORDS[:5], 4))
    path = write_parquet(tmp_path / "r.parquet", texts, datasets.Value("string"), "wnid", class_name=names)
    images = load_benchmark(path, label_column="wnid", max_images=3, seed=1)
    assert images.class_names == WORDS[:5] and len(images) == 3
    everything = load_benchmark(path, label_column="wnid")
    assert list(everything.labels) == list(np.repeat(range(5), 4))


def test_a_webdataset_copy_takes_its_names_from_the_file_beside(tmp_path):
    (tmp_path / "test").mkdir()
    for shard in range(3):
        with tarfile.open(tmp_path / "test" / f"{shard}.tar", "w") as tar:
            for index in range(10):
                number = shard * 10 + index
                buffer = io.BytesIO()
                picture(number).save(buffer, "PNG")
                for suffix, content in (("cls", str(number).encode()), ("png", buffer.getvalue())):
                    info = tarfile.TarInfo(f"s{number:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (tmp_path / "classnames.txt").write_text("\n".join(WORDS) + "\n")
    images = load_benchmark(tmp_path, label_column="cls")
    assert_rightly_labelled(images, WORDS)
    with pytest.raises(ValueError, match="expected 200 classes, got 30"):  # the column is known, its size as well
        load_benchmark("imagenet_a", data=tmp_path)


def test_cifar_10_1_is_read_from_its_released_arrays(tmp_path):
    labels = np.array([3, 9, 0, 3])
    np.save(tmp_path / "cifar10.1_v6_data.npy", np.stack([np.full((32, 32, 3), x, np.uint8) for x in labels]))
    np.save(tmp_path / "cifar10.1_v6_labels.npy", labels)
    images = load_benchmark("cifar10_1", data=tmp_path)
    assert list(images.labels) == [3, 9, 0, 3] and images.class_names[3] == "cat"
    assert np.asarray(images.image(1))[0, 0, 0] == 9 and images.constants == "cifar"
    np.save(tmp_path / "cifar10.1_v6_labels.npy", labels[:3])
    with pytest.raises(ValueError, match="expected as many images as labels"):
        load_benchmark("cifar10_1", data=tmp_path)


def test_a_subset_is_drawn_with_the_seed_and_keeps_labels_with_images(tmp_path):
    folder = write_folders(tmp_path / "x", {str(number): number for number in range(30)})
    images = load_benchmark(folder, class_names=WORDS, max_images=17, seed=3)
    assert len(images) == 17 and images.class_names == WORDS
    assert_rightly_labelled(images, WORDS)
    again, other = (load_benchmark(folder, class_names=WORDS, max_images=17, seed=seed) for seed in (3, 4))
    assert list(images.labels) == list(again.labels) != list(other.labels)
    with pytest.raises(ValueError, match="at least one image, got max_images=0"):
        load_benchmark(folder, class_names=WORDS, max_images=0)


def test_the_evaluation_split_is_chosen_and_never_train(tmp_path):
    for split, number in (("train", 1), ("test", 2)):
        write_folders(tmp_path / split, {"cat": number, "dog": number}, images_each=1)
    images = load_benchmark(tmp_path)
    assert np.asarray(images.image(0))[0, 0, 0] == 2 and images.source["split"] == "test"
    assert np.asarray(load_benchmark(tmp_path, split="train").image(0))[0, 0, 0] == 1


def test_constants_follow_the_size_unless_given(tmp_path):
    folder = write_folders(tmp_path / "small", {"cat": 0, "dog": 1})
    assert load_benchmark(folder).constants == "cifar"
    assert load_benchmark(folder, constants="imagenet").constants == "imagenet"
    picture(0).resize((100, 90)).save(folder / "cat" / "0.png")
    assert load_benchmark(folder).constants == "imagenet"


def test_images_come_upright_in_8_bit_rgb_and_damage_is_named(tmp_path):
    folder = write_folders(tmp_path / "x", {"cat": 0, "dog": 1}, images_each=1)
    tall = Image.new("L", (10, 20), 77)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    tall.save(folder / "cat" / "0.png", exif=exif)
    (folder / "dog" / "0.png").write_bytes(b"not an image")
    images = load_benchmark(folder, constants="cifar")
    assert images.image(0).size == (20, 10) and images.image(0).mode == "RGB"
    with pytest.raises(ValueError, match="image 1 of x: cannot decode"):
        images.image(1)


def test_templates_can_be_replaced(tmp_path):
    folder = write_folders(tmp_path / "x", {"cat": 0, "dog": 1}, images_each=1)
    images = load_benchmark(folder, templates=["a {}"], ensemble_templates=["a {}", "the {}"])
    assert images.templates == ("a {}",) and images.ensemble_templates == ("a {}", "the {}")


def test_scenes_are_those_that_taught_nobody():
    images = scenes_benchmark(12, seed=4)
    assert len(images) == 12 and images.class_names == list(CLASS_NAMES)
    for index in (0, 5, 11):
        scene = make_scene(index, seed=5)  # stream 0 taught the embedded teacher
        assert images.image(index).tobytes() == scene.image.tobytes() and images.label(index) == scene.label
    assert load_benchmark("scenes", max_images=12, seed=4).image(7).tobytes() == images.image(7).tobytes()


# The registry


def test_every_benchmark_of_the_paper_is_registered():
    assert set(BENCHMARKS) == {
        *("imagenet", "imagenet_a", "imagenet_v2", "imagenet_r", "imagenet_sketch", "imagenet_c"),
        *("cifar10", "cifar100", "cifar10_c", "cifar100_c", "cifar10_1"),
        *("flowers102", "dtd", "pets", "ucf101", "caltech101", "food101", "sun397", "aircraft", "eurosat"),
        "stanford_cars",
    }
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name and benchmark.num_classes and benchmark.num_images
        assert all("{}" in template for template in (*benchmark.templates, *benchmark.ensemble_templates))
        assert len(benchmark.templates) == 1 < len(benchmark.ensemble_templates)
        assert (benchmark.corruptions == CORRUPTION_NAMES) == name.endswith("_c")
        assert (benchmark.constants == "cifar") == name.startswith("cifar")


def test_a_benchmark_without_a_place_on_the_hub_says_how_to_get_it():
    with pytest.raises(ValueError, match=r"CIFAR-10\.1 has no place on the Hub; give your copy with `data`.*v6_data"):
        load_benchmark("cifar10_1")


def test_an_unconfirmed_place_on_the_hub_is_warned_of(monkeypatch):
    from apm_hf.evaluation.labels import benchmarks

    warnings = []
    monkeypatch.setattr(benchmarks.logger, "warning", warnings.append)
    benchmarks._hub_place(BENCHMARKS["ucf101"])
    benchmarks._hub_place(BENCHMARKS["food101"])
    assert len(warnings) == 1 and "middle frame" in warnings[0]


def test_the_hub_is_asked_as_registered(monkeypatch, tmp_path):
    """Id, config, split, columns and the file of names reach the libraries that download."""
    from apm_hf.evaluation.labels import benchmarks

    rows = write_parquet(tmp_path / "a.parquet", [1, 0], column="cls")
    asked = {}

    def load_images(place, **options):
        asked.update(place=place, **options)
        return real(rows, label_column="cls")

    real = benchmarks.load_images
    names = tmp_path / "classnames.txt"
    names.write_text("\n".join(f"name {index}" for index in range(200)))
    monkeypatch.setattr(benchmarks, "load_images", load_images)
    monkeypatch.setattr(benchmarks, "_choose_split", lambda place, benchmark: benchmark.split)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file, **options: tmp_path / file)
    images = load_benchmark("imagenet_a", max_images=1)
    assert asked["place"] == "clip-benchmark/wds_imagenet-a" and asked["split"] == "test"
    assert (asked["image_column"], asked["label_column"]) == ("jpg", "cls")
    assert len(images.class_names) == 200 and images.templates == ("a photo of a {}.",)


def test_a_copy_with_fewer_images_than_published_is_warned_of(monkeypatch, tmp_path):
    from apm_hf.evaluation.labels import benchmarks

    warnings = []
    monkeypatch.setattr(benchmarks.logger, "warning", warnings.append)
    load_benchmark("cifar10_1", data=write_parquet(tmp_path / "test.parquet", [0, 1, 1]))
    assert any("3 images, published are 2000" in text for text in warnings)
    assert any("8 of 10 classes have no image" in text for text in warnings)


# Label maps


def test_names_are_readable():
    readable = NameOptions().readable
    assert readable(["n01440764_great_white_shark", "n02085620-Chihuahua", "hen-of-the-woods", "  a__b "]) == [
        *("great white shark", "Chihuahua", "hen-of-the-woods", "a b")
    ]
    assert readable(["EntleBucher"]) == ["EntleBucher"]
    assert NameOptions(split_words=True).readable(["ApplyEyeMakeup", "SeaLake"]) == ["Apply Eye Makeup", "Sea Lake"]


def test_the_first_synonym_is_taken_unless_it_makes_two_classes_one():
    names = ["tench, Tinca tinca", "maillot", "maillot, tank suit", "crane", "crane2"]
    options = NameOptions(first_synonym=True, renames={"crane2": "crane"})
    assert options.readable(names) == ["tench", "maillot", "maillot, tank suit", "crane", "crane"]


def test_names_given_twice_must_be_the_same_classes_in_any_order():
    label_map = build_label_map(["n1_x", "Great_White_Shark", "hen"], ["hen", "n1 x", "great white shark"])
    assert label_map.class_names == ["hen", "n1 x", "great white shark"]
    assert list(label_map([0, 1, 2])) == [1, 2, 0]
    with pytest.raises(ValueError, match="only the data set has: hen; only `class_names`: cock"):
        build_label_map(["shark", "hen"], ["shark", "cock"])


def test_names_that_differ_in_case_or_signs_alone_are_not_confused():
    label_map = build_label_map(["Cardigan", "cardigan", "C", "C++"], ["C++", "cardigan", "Cardigan", "C"])
    assert list(label_map([0, 1, 2, 3])) == [2, 1, 3, 0]


def test_equal_names_stay_two_classes():
    sources = ["n02012849_crane", "n01440764_tench", "n03126707_crane"]
    label_map = build_label_map(sources)
    assert label_map.class_names == ["crane", "tench", "crane"] and list(label_map([0, 1, 2])) == [0, 1, 2]
    by_name = build_label_map(sources, ["tench", "crane", "crane"])
    assert sorted(by_name([0, 1, 2])) == [0, 1, 2] and by_name([1])[0] == 0


@pytest.mark.parametrize(
    ("sources", "class_names", "message"),
    [
        ([], None, "at least one class"),
        (["a", "a"], None, "expected different names of classes, got more than once: a"),
        (["n01440764", "tench"], None, "expected every class or none to have a WordNet id, got tench"),
        (["n01440764"], None, "the classes are WordNet ids"),
        (["n01440764"], {"n99999999": "x"}, "expected a name for every WordNet id, got none for n01440764"),
        (["5", "6"], ["x", "y"], "numbered from 0 or 1 without gaps, got 2 of 5..6"),
        (["0", "2"], ["x", "y"], "without gaps, got 2 of 0..2"),
        (["0", "1"], ["x", "y", "z"], "expected 2 class names, as many as there are numbers, got 3"),
        (None, None, "the labels are integers without names"),
        (["_", "b"], None, "expected a name for every class, got none for 0"),
    ],
)
def test_what_does_not_fit_is_refused(sources, class_names, message):
    with pytest.raises(ValueError, match=message):
        build_label_map(sources, class_names)


def test_folders_counted_from_one_are_understood():
    label_map = build_label_map(["1", "10", "2", *map(str, range(3, 10))], WORDS[:10])
    assert list(label_map([0, 1, 2, 3])) == [0, 9, 1, 2]


def test_a_list_of_names_goes_with_the_sorted_ids():
    label_map = build_label_map(["n20000000", "n10000000"], ["first", "second"])
    assert label_map.class_names == ["first", "second"] and list(label_map([0, 1])) == [1, 0]


def test_class_names_are_read_from_every_form(tmp_path):
    def read(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return read_class_names(tmp_path / name)

    assert read("a.txt", "\ufeffhen\nhen\n\n cock \n") == ["hen", "hen", "cock"]
    assert read("b.txt", "Prose.\nn01440764 tench, Tinca tinca\nn01443537\tgoldfish") == {
        "n01440764": "tench, Tinca tinca",
        "n01443537": "goldfish",
    }
    assert read("c.json", json.dumps({"0": ["n01440764", "tench"]})) == {"n01440764": "tench"}
    assert read("d.json", '["hen"]') == ["hen"] and read("e.json", '{"n01440764": "x"}') == {"n01440764": "x"}
    for name, text in (("f.json", "[1]"), ("g.txt", " \n"), ("h.json", '"hen"')):
        with pytest.raises(ValueError, match="expected .*names in"):
            read(name, text)


# The check against predictions


def honest(num_classes, images_each, accuracy, *, peaked=True, seed=0):
    """Labels, and predictions of a teacher whose errors prefer few classes, as real ones do."""
    rng = np.random.default_rng(seed)
    liked = rng.dirichlet(np.ones(num_classes))
    labels = np.repeat(np.arange(num_classes), images_each)
    predictions = []
    for label, skill in enumerate(rng.beta(2 * accuracy, 2 * (1 - accuracy), num_classes)):
        errors = rng.dirichlet(np.maximum(liked * (10 if peaked else 1e4), 1e-6))
        chances = skill * np.eye(num_classes)[label] + (1 - skill) * errors
        predictions.append(rng.choice(num_classes, images_each, p=chances / chances.sum()))
    return labels, np.concatenate(predictions)


def names_of(num_classes):
    """Names whose alphabetical order has nothing to do with the classes'."""
    return [f"class {number * 7919 % num_classes:04d}" for number in range(num_classes)]


SHAPES = [(10, 100), (100, 20), (200, 8), (1000, 3)]


@pytest.mark.parametrize(("num_classes", "images_each"), SHAPES)
@pytest.mark.parametrize("accuracy", [0.18, 0.4, 0.8])
def test_an_honest_teacher_passes_good_or_bad(num_classes, images_each, accuracy):
    for peaked in (True, False):
        labels, predictions = honest(num_classes, images_each, accuracy, peaked=peaked)
        check_label_map(labels, predictions, names_of(num_classes))


@pytest.mark.parametrize(("num_classes", "images_each"), SHAPES)
@pytest.mark.parametrize("accuracy", [0.4, 0.8])
def test_a_shuffled_map_is_refused_with_examples(num_classes, images_each, accuracy):
    labels, predictions = honest(num_classes, images_each, accuracy)
    shuffle = np.random.default_rng(1).permutation(num_classes)
    message = r"do not fit the class names.* images labelled 'class \d+' are taken for 'class \d+'"
    with pytest.raises(ValueError, match=message):
        check_label_map(shuffle[labels], predictions, names_of(num_classes), allow_chance=True)


@pytest.mark.parametrize("images_each", [1, 5])
def test_numbers_sorted_as_text_are_caught_and_named(images_each):
    labels, predictions = honest(1000, images_each, 0.6)
    wrong = np.argsort(sorted(range(1000), key=str))  # folder "10" is label 2
    with pytest.raises(ValueError, match="numbers sorted as text"):
        check_label_map(wrong[labels], predictions, names_of(1000))


def test_a_shift_by_one_and_alphabetical_order_are_named():
    labels, predictions = honest(200, 1, 0.6)
    with pytest.raises(ValueError, match="shifted by one"):
        check_label_map((labels + 1) % 200, predictions, names_of(200))
    names = names_of(200)
    alphabetical = np.argsort(sorted(range(200), key=names.__getitem__))
    with pytest.raises(ValueError, match="sorted alphabetically"):
        check_label_map(alphabetical[labels], predictions, names)


def test_a_missing_folder_halfway_is_caught():
    labels, predictions = honest(200, 10, 0.8)
    shifted = np.where(labels < 120, labels, 120 + (labels - 119) % 80)
    with pytest.raises(ValueError, match="do not fit the class names"):
        check_label_map(shifted, predictions, names_of(200))


def test_one_image_a_class_passes_unless_it_is_at_chance():
    labels, predictions = honest(1000, 1, 0.3)
    check_label_map(labels, predictions, names_of(1000))
    shuffled = np.random.default_rng(0).permutation(1000)[labels]
    with pytest.raises(ValueError, match="no better than chance.*allow_chance"):
        check_label_map(shuffled, predictions, names_of(1000))
    check_label_map(shuffled, predictions, names_of(1000), allow_chance=True)


def test_few_images_are_not_judged():
    labels, predictions = honest(10, 2, 0.4)
    check_label_map((labels + 3) % 10, predictions, names_of(10))


def test_a_teacher_that_always_says_the_same_is_at_chance():
    labels = np.repeat(np.arange(10), 30)
    with pytest.raises(ValueError, match=r"10\.0% of 300 images, is no better than chance, 10\.0%"):
        check_label_map(labels, np.full(300, 4), names_of(10))
    skewed = np.repeat(np.arange(10), [210, *[10] * 9])  # 70 % right without looking
    with pytest.raises(ValueError, match="no better than chance, 70"):
        check_label_map(skewed, np.zeros(300, dtype=int), names_of(10))


def test_classes_with_one_name_may_be_taken_for_each_other():
    labels, predictions = honest(20, 30, 0.95)
    names = names_of(20)
    for first in range(0, 20, 2):
        names[first + 1] = names[first]
    swapped = predictions ^ 1  # every second name is taken for the other class of that name
    check_label_map(labels, swapped, names)
    with pytest.raises(ValueError, match="do not fit"):
        check_label_map(labels, swapped, names_of(20))


def test_labels_and_predictions_must_pair():
    with pytest.raises(ValueError, match=r"expected labels and predictions \(N,\), got \(3,\) and \(2,\)"):
        check_label_map([0, 1, 1], [0, 1], ["a", "b"])
