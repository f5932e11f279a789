"""The web page of a model, which generates and edits images: ``server`` starts it, ``page`` lays it out with gradio."""
