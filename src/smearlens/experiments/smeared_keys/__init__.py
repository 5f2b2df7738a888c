"""Smeared keys and induction: the main job (`short`) and the whole study (`study`)."""
