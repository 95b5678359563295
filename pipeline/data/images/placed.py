"""A sample with the places of its images."""

from dataclasses import replace

from alignkd.errors import SampleError
from alignkd.pipeline.data.contract import Source
from alignkd.pipeline.data.images.places import place_of
from alignkd.pipeline.data.sample import Sample


def placed(sample: Sample, source: Source) -> Sample:
    """The sample, whose images lie in the image folder of its dataset; with a fault where one lies outside."""
    if not sample.images:
        return replace(sample, source=source.name) if source.name else sample
    try:
        places = tuple(place_of(source.images, reference) for reference in sample.images)
    except SampleError as error:
        return replace(sample, source=source.name, fault=str(error))
    return replace(sample, source=source.name, places=places)
