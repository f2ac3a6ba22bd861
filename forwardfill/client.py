"""The Python client: the REST contract as methods of one class. NumPy arrays go in, plain typed dictionaries come out.

```python
with Client("http://127.0.0.1:8000") as client:
    client.upsert("photos", "resnet18-v1", ids=names, embeddings=vectors, side_information=side)
    answer = client.search("photos", "resnet50-v2", query, companions={"resnet18-v1": old_query}, k=10)
```

What the service refuses is raised as a `ForwardfillError` that carries the answer's code, and the seconds to wait where it
says them; so is an answer that cannot be the service's, such as a redirect, which is not followed. What never reached the
service, or never came back, is raised as httpx raises it. Arguments that cannot be meant are a `ValueError` or a `TypeError`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import httpx

from forwardfill import following, wire
from forwardfill.answers import Answer, BatchAnswer, Contradicting, Cutover, Json, MissingSide, Order, Throttle, Upgrade
from forwardfill.errors import ForwardfillError, UpgradeStoppedError
from forwardfill.patience import patiently
from forwardfill.session import Session
from forwardfill.wire import Event, Vectors

#: what a user of the client needs, wherever it is written
__all__ = ["Client", "Event", "ForwardfillError", "UpgradeStoppedError", "Vectors"]

Metric = Literal["cosine", "inner_product", "euclidean"]

DEFAULT_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
ARROW = "application/vnd.apache.arrow.stream"
#: a fit takes minutes, and tells how far it is once a second
LOOK_SECONDS = 0.5


class Client:
    """A connection to one service. Safe to use from several threads, and in processes that are forked from the one that made
    it; close it, or use it in a `with` statement.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout: httpx.Timeout | float = DEFAULT_TIMEOUT,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Connect at the first request, not now.

        What is at a loopback address is asked past the proxies that the environment names: they would look on their own machine.

        Args:
            base_url: such as `http://127.0.0.1:8000`.
            api_key: sent as a bearer token.
            timeout: seconds per read or write, or as httpx takes it.
            transport: another way to the service, for tests.

        Raises:
            ValueError: the key is none.
        """
        self._session = Session(base_url, api_key, timeout, transport)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the service --------------------------------------------------------------------------------------------------

    def info(self) -> Json:
        """Return the service's version and limits."""
        return self._session.call("GET", "/info")

    def health(self) -> Json:
        """Return whether the service is ready to answer.

        Raises:
            ForwardfillError: it is not (503).
        """
        return self._session.call("GET", "/health/ready")

    # --- models and transformations -----------------------------------------------------------------------------------

    def register_model(
        self,
        name: str,
        *,
        dimension: int,
        metric: Metric,
        normalized: bool = False,
        side_dimension: int | None = None,
        fingerprint: str | None = None,
        description: str | None = None,
        transformations: Sequence[Json] = (),
    ) -> Json:
        """Register a model; the same again changes nothing.

        Args:
            name: of the model version.
            dimension: of its embeddings.
            metric: by which they are compared.
            normalized: whether the model gives unit vectors.
            side_dimension: of the side-information stored beside its embeddings, None if there is none.
            fingerprint: what identifies the weights.
            description: for people.
            transformations: registered with it, all or nothing.
        """
        body = {
            "name": name,
            "dimension": dimension,
            "metric": metric,
            "normalized": normalized,
            "side_information": None if side_dimension is None else {"dimension": side_dimension},
            "fingerprint": fingerprint,
            "description": description,
            "transformations": list(transformations) or None,
        }
        required = {"side_information", "fingerprint"}
        return self._session.call("POST", "/models", {k: v for k, v in body.items() if v is not None or k in required})

    def models(self) -> list[Json]:
        """Return all models."""
        return list(self._session.pages("/models"))

    def model(self, name: str) -> Json:
        """Return a model, with the galleries and transformations that use it."""
        return self._session.call("GET", f"/models/{wire.named(name)}")

    def upload_artifact(self, path: str | Path) -> str:
        """Stream a safetensors file to the service; once is enough, again costs little.

        Returns:
            Its SHA-256, by which transformations name it.
        """
        path = Path(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        headers = {"content-type": "application/octet-stream", "content-length": str(path.stat().st_size)}
        self._session.request("PUT", f"/artifacts/{digest}", content=wire.blocks(path), headers=headers)
        return digest

    def register_transformation(
        self,
        name: str,
        *,
        source: str,
        target: str,
        artifact: str,
        method: str,
        direction: Literal["forward", "backward"] = "forward",
    ) -> Json:
        """Register a transformation between two models; `artifact` is the SHA-256 of an uploaded file."""
        body = {
            "name": name,
            "source": source,
            "target": target,
            "direction": direction,
            "method": method,
            "artifact": artifact,
        }
        return self._session.call("POST", "/transformations", body)

    def transformations(self) -> list[Json]:
        """Return all transformations."""
        return list(self._session.pages("/transformations"))

    def transformation(self, name: str) -> Json:
        """Return a transformation with its evaluation."""
        return self._session.call("GET", f"/transformations/{wire.named(name)}")

    def evaluate(
        self,
        transformation: str,
        *,
        source_embeddings: Vectors,
        target_embeddings: Vectors,
        side_information: Vectors | None = None,
        labels: Iterable[int | str] | None = None,
    ) -> Json:
        """Measure a transformation on the same n items embedded by both models.

        Args:
            transformation: its name.
            source_embeddings: (n, source dimension).
            target_embeddings: (n, target dimension).
            side_information: (n, side dimension), where the transformation takes it.
            labels: n labels, for CMC and mAP.

        Raises:
            TypeError: labels are neither texts nor whole numbers, or one text is given in place of several.
        """
        body: Json = {
            "source_embeddings": wire.encoded(source_embeddings, "source_embeddings"),
            "target_embeddings": wire.encoded(target_embeddings, "target_embeddings"),
        }
        if side_information is not None:
            body["side_information"] = wire.encoded(side_information, "side_information")
        if labels is not None:
            body["labels"] = wire.label_list(labels)
        return self._session.call("POST", f"/transformations/{wire.named(transformation)}/evaluate", body)

    def start_fit(
        self,
        gallery: str,
        pairs: bytes,
        *,
        name: str,
        target: str,
        method: str = "auto",
        direction: str = "forward",
        seed: int = 0,
        use_side_information: bool | None = None,
        idempotency_key: str | None = None,
    ) -> Json:
        """Start to fit a transformation to items of a gallery and their vectors by another model; a worker does it.

        Args:
            gallery: its name.
            pairs: an Arrow IPC stream, as `forwardfill.pairs.stream` writes it.
            name: of the transformation that will be registered.
            target: the model that made the vectors.
            method: or `auto`, whichever is best.
            direction: forward or backward.
            seed: of the split and of the training.
            use_side_information: None: if all items have it.
            idempotency_key: a repeated call with the same key starts nothing new.
        """
        query = {
            "gallery": gallery,
            "name": name,
            "target": target,
            "method": method,
            "direction": direction,
            "seed": str(seed),
        }
        if use_side_information is not None:
            query["use_side_information"] = str(use_side_information).lower()
        headers = {"content-type": ARROW} | ({} if idempotency_key is None else {"idempotency-key": idempotency_key})
        return self._session.request("POST", "/transformations/fit", content=pairs, query=query, headers=headers)

    def fits(self) -> list[Json]:
        """Return all fits."""
        return list(self._session.pages("/transformations/fits"))

    def fit(self, fit_id: str) -> Json:
        """Return a fit: its progress, and once it is completed its verdict."""
        return self._session.call("GET", f"/transformations/fits/{wire.named(fit_id)}")

    def cancel_fit(self, fit_id: str) -> Json:
        """End a fit that has not ended; nothing is registered."""
        return self._session.call("POST", f"/transformations/fits/{wire.named(fit_id)}/cancel")

    def watch_fit(self, fit_id: str) -> Iterator[Json]:
        """Follow a fit until it has ended, also while the service starts again; what it is then comes last."""
        found = self.fit(fit_id)
        while True:
            yield found
            if found["finished_at"] is not None:
                return
            time.sleep(LOOK_SECONDS)
            found = patiently(lambda: self.fit(fit_id))

    # --- galleries and items ------------------------------------------------------------------------------------------

    def create_gallery(
        self,
        name: str,
        model: str,
        *,
        index: Json | None = None,
        storage_dtype: Literal["float32", "float16"] = "float32",
    ) -> Json:
        """Create a gallery of a model's embeddings; `index` is such as `{"kind": "ivf"}`, None lets the service choose."""
        body: Json = {"name": name, "model": model, "storage_dtype": storage_dtype}
        if index is not None:
            body["index"] = index
        return self._session.call("POST", "/galleries", body)

    def galleries(self) -> list[Json]:
        """Return all galleries."""
        return list(self._session.pages("/galleries"))

    def gallery(self, name: str) -> Json:
        """Return a gallery: items, columns, segments, version, active upgrade."""
        return self._session.call("GET", f"/galleries/{wire.named(name)}")

    def delete_gallery(self, name: str) -> None:
        """Delete a gallery and all it holds; an upgrade of it is cancelled first."""
        self._session.request("DELETE", f"/galleries/{wire.named(name)}")

    def compact_gallery(self, name: str) -> Json:
        """Ask for a gallery's small segments to be merged, and its deleted rows to be left out; a worker does it."""
        return self._session.call("POST", f"/admin/galleries/{wire.named(name)}/compact")

    def upsert(
        self,
        gallery: str,
        model: str,
        *,
        ids: Iterable[str],
        embeddings: Vectors,
        side_information: Vectors | None = None,
        payloads: Iterable[Json | None] | None = None,
        batch: int | None = None,
    ) -> int:
        """Write items, replacing those of the same ids, in as many requests as the service's limits ask for.

        Each request is all or nothing: when one is refused, the ones before it are stored. One that is too large for something
        before the service, such as a proxy, is sent in halves.

        Args:
            gallery: its name.
            model: that made the embeddings.
            ids: n ids.
            embeddings: (n, dimension).
            side_information: (n, side dimension), or None.
            payloads: n payloads, each a dictionary or None, in the order of the ids.
            batch: items per request at most; the service's limit unless given.

        Returns:
            The gallery's version after the last request; all before it is durable. 0 for no items.

        Raises:
            TypeError: ids are no texts, one text or payload is given in place of several, or a payload is no JSON.
            ValueError: lengths differ, vectors are no real numbers or masked, a payload holds NaN, or `batch` is less than 1.
            ForwardfillError: an item was refused; `errors` points at it, counted within its request.
        """
        if batch is not None and batch < 1:
            raise ValueError(f"batch: {batch} items per request; at least 1, or None")
        rows = wire.Rows(ids, embeddings, side_information, payloads)
        by_bytes = self._session.limit("max_body_bytes") * 9 // 10 // rows.bytes_per_item()
        size = max(1, min(batch or len(rows.ids), self._session.limit("max_items_per_upsert"), by_bytes))
        version, path = 0, f"/galleries/{wire.named(gallery)}/items"
        for answer in self._session.parts(
            path, len(rows.ids), size, lambda part: {"model": model, "items": rows.items(part)}
        ):
            version = int(answer["version"])
        return version

    def upsert_arrow(self, gallery: str, model: str, stream: bytes) -> Json:
        """Write the items of one Arrow IPC stream, in one request: `id`, `embedding`, `side_information`, `payload`.

        Returns:
            `upserted`, a number, and the gallery's `version`; all of it is durable.

        Raises:
            ForwardfillError: an item was refused, and so all; `errors` points at it.
        """
        path = f"/galleries/{wire.named(gallery)}/items"
        headers = {"content-type": ARROW, "content-length": str(len(stream))}
        # In pieces, because httpx keeps a body that it was handed whole until the garbage collector comes by.
        return self._session.request("POST", path, content=wire.pieces(stream), query={"model": model}, headers=headers)

    def delete_items(self, gallery: str, ids: Iterable[str]) -> Json:
        """Delete items; returns `deleted`, a number, and `missing`, the ids that were not there.

        Raises:
            TypeError: ids are no texts, or one text is given in place of several.
        """
        deleted, missing, wanted = 0, list[str](), wire.id_list(ids)
        size, path = self._session.limit("max_items_per_upsert"), f"/galleries/{wire.named(gallery)}/items/delete"
        for answer in self._session.parts(path, len(wanted), size, lambda part: {"ids": wanted[part]}):
            deleted += answer["deleted"]
            missing += answer["missing"]
        return {"deleted": deleted, "missing": missing}

    def item(self, gallery: str, item_id: str, *, vectors: bool = False) -> Json:
        """Return an item: its payload and columns, with their vectors if asked for."""
        query = {"include": "vectors"} if vectors else None
        return self._session.call("GET", f"/galleries/{wire.named(gallery)}/items/{wire.quoted(item_id)}", query=query)

    # --- search -------------------------------------------------------------------------------------------------------

    def search(
        self,
        gallery: str,
        model: str,
        vector: Vectors,
        *,
        k: int | None = None,
        companions: Mapping[str, Vectors] | None = None,
        filter: Json | None = None,  # noqa: A002 - the contract's word
        include: Sequence[str] = (),
        allow_partial: bool = False,
        oversample: int | None = None,
    ) -> Answer:
        """Find the k items nearest to a query.

        Args:
            gallery: its name.
            model: that embedded the query; the service never guesses it.
            vector: (dimension,).
            k: hits; None for the usual number, 10 or as many as the service allows.
            companions: the same query embedded by other models, by model name: a gallery that is on its way to `model`
                is searched by them where it has not arrived.
            filter: a condition on payloads, such as `{"price": {"lt": 50}, "category": {"in": ["shoes", "hats"]}}`; the service's
                `/openapi.json` has all operators.
            include: `payload`.
            allow_partial: answer from what can be reached, rather than be refused.
            oversample: candidates per hit that are transformed where the gallery has not arrived.

        Raises:
            TypeError: companions do not say which model's they are, or `include` is one text, not several.
            ValueError: vectors are no real numbers, or several are given for one.
        """
        body = {
            "model": model,
            **wire.query(vector, companions),
            **wire.options(k, filter, include, allow_partial, oversample),
        }
        answer: Any = self._session.call("POST", f"/galleries/{wire.named(gallery)}/search", body)
        return answer  # type: ignore[no-any-return]

    def search_batch(
        self,
        gallery: str,
        model: str,
        vectors: Vectors,
        *,
        k: int | None = None,
        companions: Mapping[str, Vectors] | None = None,
        filter: Json | None = None,  # noqa: A002
        include: Sequence[str] = (),
        allow_partial: bool = False,
        oversample: int | None = None,
    ) -> BatchAnswer:
        """Find the k items nearest to each of n queries, all in one gallery version.

        Args:
            gallery, model, k, filter, include, allow_partial, oversample: as for `search`.
            vectors: (n, dimension).
            companions: (n, dimension) by model name.

        Raises:
            TypeError: companions do not say which model's they are, or `include` is one text, not several.
            ValueError: there are not as many companions as vectors, or they are no real numbers.
        """
        own = wire.matrix(vectors, "vectors")
        given = wire.by_model({} if companions is None else companions, "companions").items()
        others = {name: wire.matrix(each, wire.companion(name)) for name, each in given}
        wire.same_count({"vectors": own, **{wire.companion(name): each for name, each in others.items()}})
        queries = [wire.query(row, {name: each[at] for name, each in others.items()}) for at, row in enumerate(own)]
        body = {"model": model, "queries": queries, **wire.options(k, filter, include, allow_partial, oversample)}
        answer: Any = self._session.call("POST", f"/galleries/{wire.named(gallery)}/search/batch", body)
        return answer  # type: ignore[no-any-return]

    def explain(
        self,
        gallery: str,
        model: str,
        vector: Vectors,
        *,
        k: int | None = None,
        companions: Mapping[str, Vectors] | None = None,
        filter: Json | None = None,  # noqa: A002
        include: Sequence[str] = (),
        allow_partial: bool = False,
        oversample: int | None = None,
    ) -> Json:
        """Search, and tell how: the plan of each segment, milliseconds by step, and recall against exact search.

        The comparison reads and transforms the whole gallery, so give the client a `timeout` that allows for that.

        Args:
            gallery, model, vector, k, companions, filter, include, allow_partial, oversample: as for `search`.

        Returns:
            `hits` and `served` of the search, and `plan`, `milliseconds` and `exact`.
        """
        body = {
            "model": model,
            **wire.query(vector, companions),
            **wire.options(k, filter, include, allow_partial, oversample),
        }
        return self._session.call("POST", f"/galleries/{wire.named(gallery)}/search/explain", body)

    def set_probes(
        self, gallery: str, vectors: Mapping[str, Vectors], *, relevant: Iterable[Iterable[str]] | None = None
    ) -> Json:
        """Replace the queries by which an upgrade of the gallery is judged.

        Args:
            gallery: its name.
            vectors: (n, dimension) by model name: n queries in each model.
            relevant: per query the ids that ought to be found, if known.

        Raises:
            TypeError: ids are no texts, one text is given in place of several, or vectors do not say which model's they are.
            ValueError: the numbers of vectors and of lists differ, or vectors are no real numbers.
        """
        given = wire.by_model(vectors, "vectors").items()
        columns = {name: wire.matrix(each, f"vectors of {name}") for name, each in given}
        wanted = None if relevant is None else [wire.id_list(ids, "relevant") for ids in relevant]
        called = {f"vectors of {name}": each for name, each in columns.items()}
        count = wire.same_count({**called, "lists of relevant ids": wanted})
        probes: list[Json] = [
            {"vectors": {n: wire.encoded(each[at]) for n, each in columns.items()}} for at in range(count)
        ]
        if wanted is not None:
            probes = [{**probe, "relevant": ids} for probe, ids in zip(probes, wanted, strict=True)]
        return self._session.call("PUT", f"/galleries/{wire.named(gallery)}/probes", {"probes": probes})

    # --- upgrades -----------------------------------------------------------------------------------------------------

    def start_upgrade(
        self,
        gallery: str,
        *,
        transformation: str | None = None,
        target_model: str | None = None,
        cutover: Cutover = "progressive",
        order: Order = "stored",
        throttle: Throttle | None = None,
        gate: Json | None = None,
        on_missing_side_information: MissingSide = "fail",
        on_contradicting_items: Contradicting = "fail",
        score_thresholds: Sequence[float] = (),
        dry_run: bool = False,
        idempotency_key: str | None = None,
    ) -> Upgrade:
        """Start to bring a gallery to another model; a worker does it.

        Args:
            gallery: its name.
            transformation: by its name; or
            target_model: by the latest forward transformation to it.
            cutover: whether a segment serves as soon as it is done, or all at once, by itself or on request.
            order: of the segments.
            throttle: see `Throttle`.
            gate: limits of quality, by which the upgrade does not start, pauses, or does not cut over.
            on_missing_side_information: what to do with items that have none.
            on_contradicting_items: `ignore` if items that came again in the target model had changed, so that their vectors
                say nothing of the transformation.
            score_thresholds: cut-offs on the scores of source-model queries; the report names those of the target model.
            dry_run: validate and report, change nothing.
            idempotency_key: a repeated call with the same key starts nothing new.
        """
        body: Json = {
            "gallery": gallery,
            "cutover": cutover,
            "order": order,
            "on_missing_side_information": on_missing_side_information,
            "dry_run": dry_run,
        }
        optional = {
            "transformation": transformation,
            "target_model": target_model,
            "throttle": throttle,
            "gate": gate,
            "score_thresholds": list(score_thresholds) or None,
            # Which a service of an earlier version does not know, and does all the same.
            "on_contradicting_items": None if on_contradicting_items == "fail" else on_contradicting_items,
        }
        body |= {name: value for name, value in optional.items() if value is not None}
        headers = {} if idempotency_key is None else {"idempotency-key": idempotency_key}
        return self._upgrade("POST", "/admin/upgrades", body, headers=headers)

    def upgrades(self) -> list[Upgrade]:
        """Return all upgrades."""
        found: list[Any] = list(self._session.pages("/admin/upgrades"))
        return found

    def upgrade(self, upgrade_id: str) -> Upgrade:
        """Return an upgrade: state, progress, quality, and why it does not go faster."""
        return self._upgrade("GET", f"/admin/upgrades/{wire.named(upgrade_id)}")

    def set_throttle(self, upgrade_id: str, throttle: Throttle) -> Upgrade:
        """Change how fast an upgrade may go, while it runs."""
        return self._upgrade("PATCH", f"/admin/upgrades/{wire.named(upgrade_id)}", {"throttle": throttle})

    def pause(self, upgrade_id: str) -> Upgrade:
        """Start no more segments; the one under way finishes."""
        return self._verb(upgrade_id, "pause")

    def resume(self, upgrade_id: str) -> Upgrade:
        """Go on where it stopped; in spite of its gate, if that stopped it after it had begun."""
        return self._verb(upgrade_id, "resume")

    def cancel(self, upgrade_id: str, *, accept_unreachable: bool = False) -> Upgrade:
        """Go back to the state before the upgrade."""
        return self._verb(upgrade_id, "cancel", accept_unreachable=accept_unreachable)

    def cutover(self, upgrade_id: str, *, accept_below_gate: bool = False) -> Upgrade:
        """Let all transformed segments serve."""
        return self._verb(upgrade_id, "cutover", accept_below_gate=accept_below_gate)

    def rollback(self, upgrade_id: str, *, accept_unreachable: bool = False) -> Upgrade:
        """Undo a completed upgrade, byte for byte."""
        return self._verb(upgrade_id, "rollback", accept_unreachable=accept_unreachable)

    def finalize(self, upgrade_id: str) -> Upgrade:
        """Let go of the older model's columns: no way back."""
        return self._verb(upgrade_id, "finalize")

    def retry(self, upgrade_id: str) -> Upgrade:
        """Try again what failed: the failed segments, and only those, or the check or the gate that ended the upgrade."""
        return self._verb(upgrade_id, "retry")

    def failures(self, upgrade_id: str) -> list[Json]:
        """Return the segments that failed, with error and attempts."""
        return list(self._session.pages(f"/admin/upgrades/{wire.named(upgrade_id)}/failures"))

    def refinement(self, upgrade_id: str, *, page_size: int = 1000, page_token: str | None = None) -> Json:
        """Return the ids whose embedding again pays most, a page of them, and what it has paid so far."""
        query = {"page_size": str(page_size), **({} if page_token is None else {"page_token": page_token})}
        return self._session.call("GET", f"/admin/upgrades/{wire.named(upgrade_id)}/refinement", query=query)

    def audit(self, *, gallery: str | None = None, upgrade: str | None = None) -> Iterator[Json]:
        """Yield who did what to models, galleries, upgrades and keys, the newest first."""
        return self._session.pages("/admin/events", gallery=gallery, upgrade=upgrade)

    def events(self, upgrade_id: str, *, after: str | None = None) -> Generator[Event, None, None]:
        """Follow an upgrade, event by event, until the service ends the stream.

        Args:
            upgrade_id: which.
            after: the id of the last event seen, to go on from there.
        """
        return following.events(self._session, upgrade_id, after)

    def wait(
        self, upgrade_id: str, *, until: str | Collection[str] = "completed", timeout: float | None = None
    ) -> Upgrade:
        """Wait by events until an upgrade is in a state. A broken stream is taken up again, and a service that is away is
        waited for, for a minute.

        A pause that somebody asked for is waited out, and so is the wait of a manual cutover: name `paused` and
        `awaiting_cutover` among the states where nobody else acts on them. A gate that paused the upgrade ends the wait.

        Args:
            upgrade_id: which.
            until: the state, or several.
            timeout: seconds, None for ever; five more where the service does not answer.

        Returns:
            The upgrade in that state.

        Raises:
            UpgradeStoppedError: it is finalized, cancelled, rolled back or failed, or its gate paused it, and that is not the
                state; or it is completed, after which the state does not come.
            TimeoutError: it did not get there in time.
        """
        states = {until} if isinstance(until, str) else set(until)
        return following.reached(self._session, upgrade_id, states, timeout)

    # --- how ----------------------------------------------------------------------------------------------------------

    def _verb(self, upgrade_id: str, verb: str, **options: bool) -> Upgrade:
        body = {name: True for name, value in options.items() if value} or None
        return self._upgrade("POST", f"/admin/upgrades/{wire.named(upgrade_id)}/{verb}", body)

    def _upgrade(
        self, method: str, path: str, body: Json | None = None, *, headers: Mapping[str, str] | None = None
    ) -> Upgrade:
        upgrade: Any = self._session.call(method, path, body, headers=headers)
        return upgrade  # type: ignore[no-any-return]
