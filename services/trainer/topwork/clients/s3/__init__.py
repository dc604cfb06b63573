"""Object storage over S3. The only package that imports boto3."""
