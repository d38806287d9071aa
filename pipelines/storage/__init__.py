"""Files that are elsewhere: s3://, gs:// and https:// addresses, read in ranges.

Each kind of store is one file with two functions, to fetch a range of a file and to list what is below a prefix. boto3
and requests do the talking: both take credentials from the environment, start no threads (so that a process may fork),
and give the entity tag with every answer, so that a file which changes is noticed. (pyarrow's file systems list a whole
bucket before they give the first name, and know no tags; fsspec's run an event loop in a thread.)
"""
