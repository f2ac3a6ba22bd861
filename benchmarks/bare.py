"""The floor that searches over HTTP are compared with: FastAPI, orjson, and one call of a FAISS index. Nothing else.

`python -m benchmarks.bare INDEX PORT` serves an index file. It takes the very body that Forwardfill takes, and answers ids
and scores; it checks nothing, knows one model, and can neither write nor upgrade.
"""

from __future__ import annotations

import argparse
import base64

import faiss
import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response


def create_app(index: faiss.Index) -> FastAPI:
    """The endpoint over one index; ids are row numbers."""
    app = FastAPI()

    @app.get("/ready")
    def ready() -> None:
        """Say that it listens."""

    @app.post("/search")
    async def search(request: Request) -> Response:
        """Search on the event loop: for calls this short, that is the fastest that one process can be."""
        body = orjson.loads(await request.body())
        query = np.frombuffer(base64.b64decode(body["vector"]), np.float32).reshape(1, -1)
        squares, rows = index.search(query, body["k"])
        scores = np.sqrt(squares[0]).tolist()
        hits = [{"id": str(row), "score": score} for row, score in zip(rows[0].tolist(), scores, strict=True)]
        return Response(orjson.dumps({"hits": hits}), media_type="application/json")

    return app


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index")
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    app = create_app(faiss.read_index(options.index))
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
