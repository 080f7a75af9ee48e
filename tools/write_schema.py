"""Write docs/plan.schema.json anew from the code: ``python tools/write_schema.py``."""

import json
from pathlib import Path

from lamina.plan import json_schema

path = Path(__file__).parents[1] / "docs" / "plan.schema.json"
path.write_text(json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
