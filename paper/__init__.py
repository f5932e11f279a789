"""The tables and figures of the paper, made with the public API of ``maskgit_pl``; see README.md."""
