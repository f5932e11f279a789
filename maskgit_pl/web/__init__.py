"""The web page of a model: generating step by step, comparing settings, editing with a brush, mask schedules.

``maskgit web`` starts it. ``page`` lays the page out with gradio; all other files are functions without gradio, which
turn what a form holds into pictures, files and commands.
"""
