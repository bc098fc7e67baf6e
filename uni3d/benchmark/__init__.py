"""PROGRAM 3: methods x prompts x seeds x budgets, made by any number of processes, measured and compared.

`work_list` says what is to do and who does it, `budgets` how many steps equal cost allows, `backends` make
one result (a mesh, or pictures in the 2-D mode), `scores` judges it, `summary` compares the methods and
`pages` draws tables, sheets and plots.
"""
