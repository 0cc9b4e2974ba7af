"""Evaluate methods on benchmarks, for several teachers and seeds; import from the modules inside.

`labels` scores predicted classes, `masks` scores segments, `methods` are what is compared. `metrics` and `statistics`
score, `tables`, `plots` and `report` present; `labels.suites` are ready-made combinations for `apm evaluate`.
"""
