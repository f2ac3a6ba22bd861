"""The demo: the main job on real images, with figures and a picture of it. Nothing else imports this."""
