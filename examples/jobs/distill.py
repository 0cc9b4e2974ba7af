# /// script
# requires-python = ">=3.11"
# dependencies = ["apm_hf[train,viz] @ git+https://github.com/user/apm_hf"]
# ///
"""`apm distill` as a job on Hugging Face's computers, or with uv on yours; uv installs what it needs.

    hf jobs uv run --flavor a10g-small --timeout 3h --secrets HF_TOKEN examples/jobs/distill.py \\
        --preset dense --teacher facebook/dinov2-small --dataset user/photos --output_dir student \\
        --push_to_hub --hub_model_id user/apm-dense
    uv run examples/jobs/distill.py --help

A job's disk is gone when it ends: the model is kept by --push_to_hub alone.
"""

import sys

from apm_hf.commands.main import main as apm


def main() -> None:
    arguments = sys.argv[1:]
    if not {"--push_to_hub", "--push-to-hub", "--help"} & set(arguments):
        sys.exit("distill.py: expected --push_to_hub and --hub_model_id user/name, a job's disk is gone when it ends")
    sys.exit(apm(["distill", *arguments]))


if __name__ == "__main__":
    main()
