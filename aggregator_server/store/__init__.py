"""All that the server must not lose, in SQL.

Every public method of a table's room is one transaction; none is half done.
"""
