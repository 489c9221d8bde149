"""VINDLU / UMT caption files: a JSON list of {"image" or "video": path, "caption": text or texts}.

There are no boxes: global-only samples, whose id is the path (a further entry of the same path
gets `#2`, `#3`, ...). Absolute paths need `--media`, the root that they are cut off at.
"""

import collections
from collections.abc import Iterator
from typing import Any

from instap_jax.data.captions import blank
from instap_jax.data.converters.reading import Request, field, load_json, relative_path


def convert(request: Request) -> Iterator[dict[str, Any]]:
    """Yields one sample for each entry, in its order."""
    seen: collections.Counter = collections.Counter()
    for index, item in enumerate(load_json(request.input, list)):
        where = f"{request.input}: [{index}]"
        kind = "video" if isinstance(item, dict) and "video" in item else "image"
        path = relative_path(field(item, kind, str, where), request, where)
        texts = field(item, "caption", (str, list), where)
        if all(map(blank, [texts] if isinstance(texts, str) else map(str, texts))):
            request.left_out["entries without caption"] += 1
            continue
        seen[path] += 1
        yield {
            "id": path if seen[path] == 1 else f"{path}#{seen[path]}",
            "media": path,
            "kind": kind,
            "source": request.input.stem,
            "caption": texts,
        }
