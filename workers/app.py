"""The Celery app: transport only. Nothing of a job is in a message, so nothing is lost with one.

Without a broker URL, messages are files in a folder beside the data: no server to install, and one host only.
"""

from __future__ import annotations

from pathlib import Path
from ssl import CERT_REQUIRED
from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from kombu.entity import Exchange, Queue
from kombu.transport import TRANSPORT_ALIASES

from workers.settings import WorkerSettings

WORK = "forwardfill.work"
_QUEUE = "forwardfill"
_LOCAL = "files"
TRANSPORT_ALIASES[_LOCAL] = "workers.local_broker:Transport"
# Files are looked for, not waited for; a tenth of a second is not felt and costs nothing.
_LOCAL_POLLING_SECONDS = 0.1


def create_app(settings: WorkerSettings, data: Path) -> Celery:
    """An app that sends to, or takes from, the settings' broker; without one, messages lie beside `data`."""
    app = Celery("forwardfill", broker=settings.broker_url or f"{_LOCAL}://localhost")
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        # The nameless exchange leads to the queue itself, so nothing has to be bound, or can be found unbound.
        task_queues=[Queue(_QUEUE, Exchange(""), routing_key=_QUEUE)],
        task_default_queue=_QUEUE,
        task_default_exchange="",
        task_default_routing_key=_QUEUE,
        task_ignore_result=True,
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # A Redis that is no master any more, or has no memory left, refuses; Celery would end the worker for that.
        broker_channel_error_retry=True,
        # Else Celery hands the password to whoever answers. What the URL says of TLS comes in the place of this.
        broker_use_ssl=urlsplit(settings.broker_url).scheme == "rediss" and {"ssl_cert_reqs": CERT_REQUIRED},
        broker_transport_options=_transport(settings, data),
    )
    return app


def _transport(settings: WorkerSettings, data: Path) -> dict[str, Any]:
    if settings.broker_url:
        return {"socket_connect_timeout": 2, "socket_timeout": 10}
    folder = data.absolute() / "broker"
    for part in ("messages", "control"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    return {
        "data_folder_in": str(folder / "messages"),
        "data_folder_out": str(folder / "messages"),
        "control_folder": str(folder / "control"),
        "store_processed": False,
        "polling_interval": _LOCAL_POLLING_SECONDS,
    }
