"""Terms of other papers, a file each: registered as a term from outside is, by :mod:`alignkd.losses.recipes.more_terms`."""
