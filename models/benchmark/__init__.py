"""Every method trained, evaluated and put beside the published figures: `python -m models benchmark`."""
