"""Use frozen models as teachers: images and class names in, targets for a student out."""

from .teacher import DEFAULT_LOGIT_SCALE, DEFAULT_TEMPLATES, Teacher, TeacherOutput, first_five, load_teacher

__all__ = ["DEFAULT_LOGIT_SCALE", "DEFAULT_TEMPLATES", "Teacher", "TeacherOutput", "first_five", "load_teacher"]
