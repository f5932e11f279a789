"""The published rows of the paper's tables, which ``tables`` prints next to ours.

Tables 1 and 3 are measured on ImageNet with 50,000 images, Table 2 on Places2, all with the features of Inception.
Other values are comparable with them only for the same data, network and number of images.

Source: Chang et al., MaskGIT, CVPR 2022, arXiv:2202.04200, Tables 1 to 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from maskgit_pl.evaluation.editing_tasks import Task

__all__ = [
    "CLASSIFIER_ON_REAL_IMAGES",
    "EDITING",
    "GENERATION",
    "SCHEDULES",
    "PublishedEditing",
    "PublishedGeneration",
    "PublishedSchedule",
]


@dataclass(frozen=True)
class PublishedGeneration:
    """A row of Table 1.

    Args:
        model: Name of the model.
        size: Edge of the images, in pixels.
        fid: Frechet distance.
        inception_score: Inception score as printed; None if the table has none.
        precision: Precision of Kynkaanniemi et al.; None if the table has none.
        recall: Recall of Kynkaanniemi et al.; None if the table has none.
        parameters: Number of parameters as printed.
        steps: Forward passes per image as printed.
        cas_top1: Classification accuracy score, top 1 in percent; None if the table has none.
        cas_top5: Classification accuracy score, top 5 in percent; None if the table has none.
    """

    model: str
    size: int
    fid: float
    inception_score: str | None
    precision: float | None
    recall: float | None
    parameters: str
    steps: str
    cas_top1: float | None = None
    cas_top5: float | None = None


@dataclass(frozen=True)
class PublishedEditing:
    """A row of Table 2.

    Args:
        task: Outpainting of the right 50 %, or inpainting of the centre of 50 % x 50 %.
        model: Name of the model.
        size: Edge of the images, in pixels.
        fid: Frechet distance.
        inception_score: Inception score.
    """

    task: Task
    model: str
    size: int
    fid: float
    inception_score: float


@dataclass(frozen=True)
class PublishedSchedule:
    """A row of Table 3.

    Args:
        schedule: Registered name of the schedule.
        best_steps: The T with the lowest FID.
        fid: Frechet distance at that T.
        inception_score: Inception score at that T.
        nll: Masked negative log-likelihood, in nats per masked token.
    """

    schedule: str
    best_steps: int
    fid: float
    inception_score: float
    nll: float


GENERATION = (
    PublishedGeneration("DCTransformer", 256, 36.51, None, 0.36, 0.67, "738M", ">1024"),
    PublishedGeneration("BigGAN-deep", 256, 6.95, "198.2", 0.87, 0.28, "160M", "1", 43.99, 67.89),
    PublishedGeneration("Improved DDPM", 256, 12.26, None, 0.70, 0.62, "280M", "250"),
    PublishedGeneration("ADM", 256, 10.94, "101.0", 0.69, 0.63, "554M", "250"),
    PublishedGeneration("VQVAE-2", 256, 31.11, "~45", 0.36, 0.57, "13.5B", "5120", 54.83, 77.59),
    PublishedGeneration("VQGAN", 256, 15.78, "78.3", None, None, "1.4B", "256"),
    PublishedGeneration("VQGAN* (autoregressive)", 256, 18.65, "80.4", 0.78, 0.26, "227M", "256", 53.10, 76.18),
    PublishedGeneration("MaskGIT", 256, 6.18, "182.1", 0.80, 0.51, "227M", "8", 63.14, 84.45),
    PublishedGeneration("BigGAN-deep", 512, 8.43, "232.5", 0.88, 0.29, "160M", "1", 44.02, 68.22),
    PublishedGeneration("ADM", 512, 23.24, "58.06", 0.73, 0.60, "559M", "250"),
    PublishedGeneration("VQGAN* (autoregressive)", 512, 26.52, "66.8", 0.73, 0.31, "227M", "1024", 51.29, 74.24),
    PublishedGeneration("MaskGIT", 512, 7.32, "156.0", 0.78, 0.50, "227M", "12", 63.43, 84.79),
)
CLASSIFIER_ON_REAL_IMAGES = (76.6, 93.1)  # top-1 and top-5 of the classifier that was trained on real images
EDITING = (
    PublishedEditing("outpaint-right", "Boundless (from prior work)", 256, 35.02, 6.15),
    PublishedEditing("outpaint-right", "In&Out (from prior work)", 256, 23.57, 7.18),
    PublishedEditing("outpaint-right", "InfinityGAN", 256, 10.60, 5.57),
    PublishedEditing("outpaint-right", "Boundless, TFHub model", 256, 7.80, 5.99),
    PublishedEditing("outpaint-right", "MaskGIT", 512, 6.78, 11.69),
    PublishedEditing("inpaint-centre", "DeepFill", 256, 11.51, 22.55),
    PublishedEditing("inpaint-centre", "ICT (trained on a subset of Places2)", 256, 13.63, 17.70),
    PublishedEditing("inpaint-centre", "HiFill", 512, 16.60, 19.93),
    PublishedEditing("inpaint-centre", "CoModGAN", 512, 7.13, 21.82),
    PublishedEditing("inpaint-centre", "MaskGIT", 512, 7.92, 22.95),
)
SCHEDULES = (
    PublishedSchedule("exp", 8, 7.89, 156.3, 4.83),
    PublishedSchedule("cubic", 9, 7.26, 165.2, 4.63),
    PublishedSchedule("square", 10, 6.35, 179.9, 4.38),
    PublishedSchedule("cosine", 10, 6.06, 181.5, 4.22),
    PublishedSchedule("linear", 16, 7.51, 113.2, 3.75),
    PublishedSchedule("sqrt", 32, 12.33, 99.0, 3.34),
    PublishedSchedule("log", 60, 29.17, 47.9, 3.08),
)
