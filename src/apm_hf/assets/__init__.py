"""Name the small trained models in this package, for work without a network."""

from pathlib import Path

_ASSETS = Path(__file__).parent
DEMO_TEACHER = str(_ASSETS / "demo-teacher")  # made by scripts/make_demo_teacher.py
DEMO_MODEL = str(_ASSETS / "demo-apm")  # made by scripts/make_demo_model.py
PHOTO_TEACHER = str(_ASSETS / "photo-teacher")  # made by scripts/make_photo_teacher.py
PHOTO_MODEL = str(_ASSETS / "dense-photo")  # the dense student of PHOTO_TEACHER, made by scripts/make_dense.py
DENSE_MODEL = str(_ASSETS / "dense-deit-tiny")  # made by scripts/make_dense.py
STUDENT_MODEL = str(_ASSETS / "student-deit-tiny")  # made by scripts/make_student.py
EFFICIENTNET_MODEL = str(_ASSETS / "dense-efficientnet-lite0")  # made by scripts/make_dense.py
DENSE_MODELS = (PHOTO_MODEL, DENSE_MODEL, EFFICIENTNET_MODEL)  # each of another teacher
EMBEDDED = "embedded"  # what PHOTO_TEACHER is called wherever a teacher is named
