"""The app as a Space of the Hub; docs/serving.md says how to publish it.

pip install -r requirements.txt && python app.py                         # the embedded APM, no network
APM_MODEL=user/apm APM_TEACHER=openai/clip-vit-base-patch16 python app.py  # yours; on a Space, as variables
"""

import os

from apm_hf.app import launch

if __name__ == "__main__":
    launch(os.environ.get("APM_MODEL"), os.environ.get("APM_TEACHER"))
