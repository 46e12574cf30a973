"""A helper process for the tests of JsonLineProcess: says what it was given."""

from __future__ import annotations

import json
import sys

print(json.dumps({"arguments": sys.argv[1:]}), flush=True)
for line in sys.stdin:
    question = json.loads(line)
    if question == "end":
        sys.exit(3)
    print(json.dumps({"asked": question}), flush=True)
