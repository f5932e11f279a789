"""The web page of a model: generating step by step, comparing settings, editing with a brush, mask schedules.

``maskgit web`` starts it. ``page``, ``tab_edit`` and ``form`` lay the page out with gradio; the other files turn what a
form holds into pictures, files and commands without it.
"""
