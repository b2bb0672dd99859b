"""Serve a model over HTTP with FastAPI.

pip install fastapi uvicorn
XMC_MODEL=outputs/mine/model uvicorn --app-dir launchers/examples serve_fastapi:app --port 8000
curl localhost:8000/predict -H 'content-type: application/json' -d '{"texts": ["printer is jammed"], "k": 3}'

Each worker (--workers N) loads a model of its own. Send several texts in a request: a batch takes less time than its texts alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

from xmc_trainer import XMCModel
from xmc_trainer.errors import UserError

ONE_AT_A_TIME = threading.Lock()  # a prediction already uses all cores


@asynccontextmanager
async def load(app: FastAPI) -> AsyncIterator[None]:
    app.state.model = XMCModel.load(os.environ["XMC_MODEL"])
    yield


app = FastAPI(title="xmc_trainer", lifespan=load)


class Request(BaseModel):
    texts: list[str] = Field(min_length=1, max_length=1024)
    k: int = 5


@app.post("/predict")
def predict(request: Request) -> list[list[dict[str, str | float]]]:
    """Return for each text its k best labels, best first: id, text and score."""
    try:
        with ONE_AT_A_TIME:
            predictions = app.state.model.predict(request.texts, k=request.k)
    except UserError as error:
        raise HTTPException(422, str(error)) from None
    return [[label._asdict() for label in labels] for labels in predictions]


@app.get("/health")
def health() -> dict[str, int]:
    """Answer once the model is loaded."""
    return {"labels": app.state.model.saved.head.num_labels}
